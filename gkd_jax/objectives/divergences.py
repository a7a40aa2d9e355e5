"""Divergences between teacher and student, each written once, as a term per vocabulary entry.

D(P || Q) = sum over v of f(log q_v, log p_v), with P the teacher and Q the student. A class here
gives f and its slope f'_v = df/d log q_v. Everything else is the framework's and is in
`token_divergence`: normalising, temperatures, the sum over entries, and the gradient
with respect to the student's logits, f'_v - q_v * sum_u f'_u.

That gradient does not change when a multiple of q_v is added to every f'_v, nor the sum when
q_v - p_v is added to every f. The KL terms use this freedom: with it f and f' are exactly 0 where
p_v = q_v, and rounding in a normaliser enters only to second order.
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float

_MAX_EXPONENT = 40.0

EXCLUDED_LOG_PROB = -1e30
"""Log-probability that a term sees, of both models, for an entry that both exclude."""


@dataclasses.dataclass(frozen=True)
class VocabularyEntries:
    """Next-token distributions of student and teacher, one row per token, as a term sees them.

    Each row is a complete distribution: its probabilities sum to 1. Its entries are usually the
    whole vocabulary. With a sparse teacher they are the tokens that it stores and one more entry
    for all others, so a term must not rely on the size or the order of the last axis.

    An entry that one model excludes has log-probability -inf for that model. An entry that both
    models exclude has `EXCLUDED_LOG_PROB` for both, a finite number: its probabilities are exactly
    0, its log-ratio is 0, and sums over a row are as if it were not there. Its term and slope are
    replaced by 0 afterwards. Without a teacher nothing is replaced.

    Attributes:
      student_log_probs: log q_v, normalised, student temperature applied.
      teacher_log_probs: log p_v, normalised, teacher temperature applied; None if the divergence
        needs no teacher.
      is_target: True on the entry of the output token.
      advantages: advantage of the output token, a constant; None if the divergence needs none.
    """

    student_log_probs: Float[Array, "*n V"]
    teacher_log_probs: Float[Array, "*n V"] | None
    is_target: Bool[Array, "*n V"]
    advantages: Float[Array, "*n 1"] | None = None

    @property
    def student_probs(self) -> Float[Array, "*n V"]:
        """q_v."""
        return jnp.exp(self.student_log_probs)

    @property
    def teacher_probs(self) -> Float[Array, "*n V"]:
        """p_v."""
        return jnp.exp(self.checked_teacher_log_probs)

    @property
    def log_ratio(self) -> Float[Array, "*n V"]:
        """d_v = log p_v - log q_v; +inf where only q_v is 0, -inf where only p_v is 0.

        Compilers contract multiplications with sums, so that with temperatures other than 1 it
        may be a rounding away from 0 where P = Q: a slope that jumps at 0 needs a dead zone.
        """
        return self.checked_teacher_log_probs - self.student_log_probs

    @property
    def checked_teacher_log_probs(self) -> Float[Array, "*n V"]:
        """log p_v, for a divergence that needs a teacher."""
        assert self.teacher_log_probs is not None, "a divergence that reads it needs_teacher"
        return self.teacher_log_probs

    @property
    def is_excluded(self) -> Bool[Array, "*n V"]:
        """True on entries that both models exclude."""
        return self.checked_teacher_log_probs == EXCLUDED_LOG_PROB

    @property
    def teacher_entropy(self) -> Float[Array, "*n 1"]:
        """H(P) of each token in nats."""
        terms = times_log(self.teacher_probs, self.checked_teacher_log_probs)
        return -jnp.sum(terms, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Divergence(abc.ABC):
    """A divergence D(P || Q) as a sum of terms; subclass it to add one.

    Attributes:
      needs_teacher: whether the term reads the teacher's log-probabilities.
      needs_advantages: whether it reads the advantages of the output tokens.
      is_linear_in_teacher: whether the slopes are linear in the teacher's probabilities. Then the
        gradient to an unbiased estimate of them, such as counts of draws, is unbiased.
    """

    needs_teacher: ClassVar[bool] = True
    needs_advantages: ClassVar[bool] = False
    is_linear_in_teacher: ClassVar[bool] = False

    @abc.abstractmethod
    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """Contribution f_v of each entry; their sum over a row is the divergence of a token.

        Usually an elementwise function of log q_v and log p_v. A divergence that is no sum over
        entries, such as a logarithm of one, may read its whole row and split its value among the
        entries in any way, as `RenyiDivergence` does.
        """

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """Derivative of the divergence in log q_v, up to a common multiple of q_v.

        Each entry gets the derivative of its row's sum of terms,

            f'_v = d/d(log q_v) sum_u f_u,

        which for an elementwise term is the derivative of f_v alone. This default differentiates
        `term` in reverse mode. Override it if a closed form is exact and the derivative of the
        written formula is not. Where an entry is -inf for one model, a branch of `jnp.where` that
        is not taken must have a finite derivative too, or the slope is NaN; `times_log` and `mix`
        are safe in this respect.
        """

        def row_sums(student_log_probs: Array) -> Array:
            replaced = dataclasses.replace(entries, student_log_probs=student_log_probs)
            return jnp.sum(self.term(replaced), axis=-1)

        sums, pullback = jax.vjp(row_sums, entries.student_log_probs)
        (slope,) = pullback(jnp.ones_like(sums))
        return slope


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood(Divergence):
    """-log q of the output token: supervised fine-tuning, or SeqKD on a teacher's outputs.

    SeqKD is "Sequence-Level Knowledge Distillation" (arXiv 1606.07947).
    """

    needs_teacher: ClassVar[bool] = False
    is_linear_in_teacher: ClassVar[bool] = True

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-log q_v on the output token, 0 elsewhere."""
        return jnp.where(entries.is_target, -entries.student_log_probs, 0.0)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-1 on the output token, 0 elsewhere."""
        return -entries.is_target.astype(entries.student_log_probs.dtype)


@dataclasses.dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(P || Q) = sum of p_v (log p_v - log q_v), from the teacher: covers its modes.

    +inf where the teacher gives probability to an entry that the student excludes.
    """

    is_linear_in_teacher: ClassVar[bool] = True

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """p d + (q - p), which is never negative; the bracket sums to 0."""
        student, teacher = entries.student_probs, entries.teacher_probs
        return times_log(teacher, entries.log_ratio) + (student - teacher)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q - p."""
        return entries.student_probs - entries.teacher_probs


@dataclasses.dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(Q || P) = sum of q_v (log q_v - log p_v), from the student: seeks a mode.

    The divergence of "MiniLLM: Knowledge Distillation of Large Language Models"
    (arXiv 2306.08543).

    +inf where the student gives probability to an entry that the teacher excludes; the gradient
    of such a token does not exist.
    """

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-q d + (p - q), which is never negative; the bracket sums to 0."""
        student, teacher = entries.student_probs, entries.teacher_probs
        return (teacher - student) - times_log(student, entries.log_ratio)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-q d."""
        return -times_log(entries.student_probs, entries.log_ratio)


@dataclasses.dataclass(frozen=True)
class GeneralizedJSD(Divergence):
    """JSD_beta(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.

    The generalized Jensen-Shannon divergence of "On-Policy Distillation of Language Models:
    Learning from Self-Generated Mistakes" (GKD, arXiv 2306.13649, section 2). With
    d = log p - log q and r = log m - log q = log1p(beta expm1(d)) the term is
    beta p (d - r) - (1 - beta) q r. In d/d log q the derivatives of the logarithm of m cancel,
    which leaves the slope -(1 - beta) q r. All are exactly 0 where p = q.

    JSD_beta tends to 0 at both ends, as beta KL(P || Q) and as (1 - beta) KL(Q || P), so the
    ends are divergences of their own here: `ForwardKL` and `ReverseKL`.

    Attributes:
      beta: the teacher's share of the mixture M, 0 < beta < 1.
      normalized: divides by beta (1 - beta), so that the values tend to the forward and the
        reverse KL at the ends, and rates of learning compare across beta. The paper does not.

    Raises:
      ValueError: beta is not inside (0, 1).
    """

    beta: float
    normalized: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.beta, (int, float)) and 0.0 < self.beta < 1.0):
            raise ValueError(
                f"GeneralizedJSD.beta must be between 0 and 1, ends excluded; got {self.beta!r}. "
                "For beta=0 use ForwardKL, the limit of JSD/beta; for beta=1 use ReverseKL, the "
                "limit of JSD/(1-beta)."
            )

    @property
    def _scale(self) -> float:
        return 1.0 / (self.beta * (1.0 - self.beta)) if self.normalized else 1.0

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """beta p (d - r) - (1 - beta) q r."""
        log_p_over_m, log_m_over_q = self._log_ratios_to_mixture(entries)
        of_teacher = times_log(entries.teacher_probs, log_p_over_m)
        of_student = times_log(entries.student_probs, log_m_over_q)
        return self._scale * (self.beta * of_teacher - (1.0 - self.beta) * of_student)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-(1 - beta) q r."""
        _, log_m_over_q = self._log_ratios_to_mixture(entries)
        scale = self._scale * (1.0 - self.beta)
        return -scale * times_log(entries.student_probs, log_m_over_q)

    def _log_ratios_to_mixture(self, entries: VocabularyEntries) -> tuple[Array, Array]:
        """log p - log m and log m - log q, for any log-ratio from -inf to +inf."""
        # The small share is always that of the first: near an end of beta the other order
        # would lose the digits that are left of the divergence there.
        if self.beta <= 0.5:
            return mix(entries.log_ratio, self.beta)
        log_q_over_m, log_m_over_p = mix(-entries.log_ratio, 1.0 - self.beta)
        return -log_m_over_p, -log_q_over_m


def mix(log_ratio: Array, share: float) -> tuple[Array, Array]:
    """log a - log m and log m - log b, with m = share a + (1 - share) b.

    log m - log b = log1p(share expm1(log a - log b)). Where exp would overflow b no longer
    counts in m, and log a - log m is -log(share).
    """
    capped = jnp.minimum(log_ratio, _MAX_EXPONENT)
    log_m_over_b = jnp.log1p(share * jnp.expm1(capped))
    log_a_over_m = jnp.where(log_ratio > _MAX_EXPONENT, -math.log(share), capped - log_m_over_b)
    return log_a_over_m, log_m_over_b + jnp.maximum(log_ratio - _MAX_EXPONENT, 0.0)


@jax.custom_jvp
def times_log(probs: Array, logs: Array) -> Array:
    """probs * logs with the limit 0 where probs is 0, whatever the logarithm."""
    return jnp.where(probs > 0, probs * logs, 0.0)


@times_log.defjvp
def _times_log_derivative(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # By itself the reverse mode would multiply a cotangent of 0 by an infinite logarithm.
    (probs, logs), (of_probs, of_logs) = primals, tangents
    finite = jnp.where(probs > 0, logs, 0.0)
    tangent = jnp.where(probs > 0, finite * of_probs + probs * of_logs, 0.0)
    return times_log(probs, logs), tangent
