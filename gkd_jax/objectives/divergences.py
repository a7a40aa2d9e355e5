"""Divergences between teacher and student, each defined by a term per vocabulary entry.

With P the teacher's and Q the student's distribution of the next token,

    D(P || Q) = sum over v of f(log q_v, log p_v).

Each class defines the term f and the slope f'_v, the derivative with respect to log q_v. Everything
else is the same for every divergence and is in `per_token`: normalisation, temperatures, the sum
over entries, and the gradient with respect to the student's logits,

    f'_v - q_v * sum over u of f'_u.

Adding the same multiple of q_v to every slope does not change that gradient. Adding q_v - p_v to
every term does not change the sum over v. The KL divergences make both changes, so that their terms
and slopes are exactly 0 where p_v = q_v. A rounding error of a normaliser then changes the
divergence only to second order.

To add a divergence, subclass `Divergence` in `other_divergences`. Tests fail until the class is
exported, has a row in the table of docs/objectives.md, and has a float64 definition in
tests/divergence_references.py.
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
"""Log-probability that replaces -inf, for both models, at an entry that both models exclude."""


@dataclasses.dataclass(frozen=True)
class VocabularyEntries:
    """Next-token distributions of student and teacher, one row per token: the input of a term.

    Each row is a complete distribution: its probabilities sum to 1. Its entries are usually the
    whole vocabulary. With a sparse teacher they are the tokens that the teacher stores and one more
    entry for all other tokens. A term must therefore not rely on the size or the order of the last
    axis.

    An entry that one model excludes has log-probability -inf for that model. An entry that both
    models exclude has the finite number `EXCLUDED_LOG_PROB` for both. Its probabilities are then
    exactly 0, its log-ratio is 0, and it adds nothing to sums over its row. Its term and slope are
    replaced by 0 after they are computed. Without a teacher, excluded entries keep -inf, and no
    term or slope is replaced.

    Attributes:
      student_log_probs: log q_v, normalised, with the student temperature applied.
      teacher_log_probs: log p_v, normalised, with the teacher temperature applied; None if the
        divergence needs no teacher.
      is_target: True at the entry of the output token.
      advantages: advantage of the output token, a constant; None if the divergence needs none.
    """

    student_log_probs: Float[Array, "*n V"]
    teacher_log_probs: Float[Array, "*n V"] | None
    is_target: Bool[Array, "*n V"]
    advantages: Float[Array, "*n 1"] | None = None

    @property
    def student_probs(self) -> Float[Array, "*n V"]:
        """Student probabilities q_v."""
        return jnp.exp(self.student_log_probs)

    @property
    def teacher_probs(self) -> Float[Array, "*n V"]:
        """Teacher probabilities p_v."""
        return jnp.exp(self.checked_teacher_log_probs)

    @property
    def log_ratio(self) -> Float[Array, "*n V"]:
        """d_v = log p_v - log q_v; +inf where only q_v is 0, -inf where only p_v is 0.

        Compilers may fuse a multiplication and a sum, which changes the rounding. With temperatures
        other than 1, the log-ratio may therefore differ from 0 by a rounding error even if P = Q.
        A slope that is discontinuous at 0 has to treat such small values as 0.
        """
        return self.checked_teacher_log_probs - self.student_log_probs

    @property
    def checked_teacher_log_probs(self) -> Float[Array, "*n V"]:
        """`teacher_log_probs`, asserted not to be None."""
        assert self.teacher_log_probs is not None, "a divergence that reads it needs_teacher"
        return self.teacher_log_probs

    @property
    def is_excluded(self) -> Bool[Array, "*n V"]:
        """True on entries that both models exclude."""
        return self.checked_teacher_log_probs == EXCLUDED_LOG_PROB

    @property
    def teacher_entropy(self) -> Float[Array, "*n 1"]:
        """Entropy of the teacher's distribution of each token, in nats."""
        terms = times_log(self.teacher_probs, self.checked_teacher_log_probs)
        return -jnp.sum(terms, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Divergence(abc.ABC):
    """Base class of all divergences. Defines D(P || Q) as a sum of terms.

    Attributes:
      needs_teacher: whether the term reads the teacher's log-probabilities.
      needs_advantages: whether the slope reads the advantages of the output tokens.
      is_linear_in_teacher: whether the slopes are linear in the teacher's probabilities. If they
        are, an unbiased estimate of the probabilities, such as counts of sampled tokens, gives an
        unbiased gradient.

    Examples:
      Only the term has to be defined:

      >>> import dataclasses
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> @dataclasses.dataclass(frozen=True)
      ... class SquaredDistance(objectives.Divergence):
      ...     def term(self, entries):
      ...         return jnp.square(entries.teacher_probs - entries.student_probs)
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = SquaredDistance()
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.1250
    """

    needs_teacher: ClassVar[bool] = True
    needs_advantages: ClassVar[bool] = False
    is_linear_in_teacher: ClassVar[bool] = False

    @abc.abstractmethod
    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """Returns the contribution f_v of each entry; their sum over a row is the divergence.

        The term is usually an elementwise function of log q_v and log p_v. If the divergence is not
        a sum over entries, but for example the logarithm of such a sum, the term may read the whole
        row and distribute the value over the entries in any way, as `RenyiDivergence` does.
        """

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """Returns the derivative of the divergence with respect to log q_v.

        The slope of an entry is the derivative of its row's sum of terms,

            f'_v = d/d(log q_v) sum over u of f_u.

        For an elementwise term this is the derivative of f_v alone. An override may add c q_v to
        each entry v, with one c for the whole row: the gradient in the logits does not change.

        This default differentiates `term` in reverse mode. Override it if a closed form is more
        accurate than automatic differentiation. If an entry is -inf for one model, all branches of
        a `jnp.where` in `term` need a finite derivative, even those that are not selected;
        otherwise the slope is NaN. `times_log` and `mix` are safe in this respect.
        """

        def row_sums(student_log_probs: Array) -> Array:
            replaced = dataclasses.replace(entries, student_log_probs=student_log_probs)
            return jnp.sum(self.term(replaced), axis=-1)

        sums, pullback = jax.vjp(row_sums, entries.student_log_probs)
        (slope,) = pullback(jnp.ones_like(sums))
        return slope


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood(Divergence):
    """Negative log-likelihood of the output token,

        -log q_y.

    On the data's outputs this is supervised fine-tuning. On outputs generated by a teacher it is
    SeqKD ("Sequence-Level Knowledge Distillation", arXiv 1606.07947). No teacher distribution is
    read.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student = jnp.log(jnp.array([[0.25, 0.75]]))
      >>> divergence = objectives.NegativeLogLikelihood()
      >>> values = objectives.token_divergence(divergence, student, None, jnp.array([1]))
      >>> print(f"{values[0]:.4f}")
      0.2877
    """

    needs_teacher: ClassVar[bool] = False
    is_linear_in_teacher: ClassVar[bool] = True

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-log q_v at the output token, 0 elsewhere."""
        return jnp.where(entries.is_target, -entries.student_log_probs, 0.0)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-1 at the output token, 0 elsewhere."""
        return -entries.is_target.astype(entries.student_log_probs.dtype)


@dataclasses.dataclass(frozen=True)
class ForwardKL(Divergence):
    """Forward Kullback-Leibler divergence, the objective of supervised distillation,

        KL(P || Q) = sum of p_v (log p_v - log q_v).

    It makes the student cover all modes of the teacher. The divergence is +inf if the student
    excludes an entry to which the teacher gives probability.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.ForwardKL()
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.1438
    """

    is_linear_in_teacher: ClassVar[bool] = True

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """p d + (q - p), with d = log p - log q. It is never negative; q - p sums to 0."""
        student, teacher = entries.student_probs, entries.teacher_probs
        return times_log(teacher, entries.log_ratio) + (student - teacher)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q - p."""
        return entries.student_probs - entries.teacher_probs


@dataclasses.dataclass(frozen=True)
class ReverseKL(Divergence):
    """Reverse Kullback-Leibler divergence,

        KL(Q || P) = sum of q_v (log q_v - log p_v).

    It makes the student concentrate on one mode of the teacher. "MiniLLM: Knowledge Distillation of
    Large Language Models" (arXiv 2306.08543) minimises the reverse KL of whole outputs: see
    `objectives.sequence_kl`. If the teacher excludes an entry to which the student gives
    probability, the divergence of that token is +inf and has no gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.ReverseKL()
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.1308
    """

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-q d + (p - q), with d = log p - log q. It is never negative; p - q sums to 0."""
        student, teacher = entries.student_probs, entries.teacher_probs
        return (teacher - student) - times_log(student, entries.log_ratio)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-q d, with d = log p - log q."""
        return -times_log(entries.student_probs, entries.log_ratio)


@dataclasses.dataclass(frozen=True)
class GeneralizedJSD(Divergence):
    """Generalized Jensen-Shannon divergence,

        JSD_beta(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q.

    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD,
    arXiv 2306.13649, section 2).

    JSD_beta itself tends to 0 at both ends of beta. JSD_beta / beta tends to KL(P || Q) as beta
    tends to 0, and JSD_beta / (1 - beta) tends to KL(Q || P) as beta tends to 1. These two limits
    are separate classes, `ForwardKL` and `ReverseKL`.

    With d = log p - log q and r = log m - log q = log1p(beta expm1(d)) the term is
    beta p (d - r) - (1 - beta) q r. The derivatives of log m cancel, which leaves the slope
    -(1 - beta) q r. Term and slope are exactly 0 where p = q.

    Attributes:
      beta: the teacher's share of the mixture M, 0 < beta < 1.
      normalized: whether to divide by beta (1 - beta), which the paper does not do. The values then
        tend to the forward KL as beta tends to 0 and to the reverse KL as beta tends to 1, and
        learning rates are comparable across beta.

    Raises:
      ValueError: `beta` is not inside (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.GeneralizedJSD(beta=0.5)
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.0338
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
        teacher_part = times_log(entries.teacher_probs, log_p_over_m)
        student_part = times_log(entries.student_probs, log_m_over_q)
        return self._scale * (self.beta * teacher_part - (1.0 - self.beta) * student_part)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-(1 - beta) q r."""
        _, log_m_over_q = self._log_ratios_to_mixture(entries)
        scale = self._scale * (1.0 - self.beta)
        return -scale * times_log(entries.student_probs, log_m_over_q)

    def _log_ratios_to_mixture(self, entries: VocabularyEntries) -> tuple[Array, Array]:
        """Returns log p - log m and log m - log q. The log-ratios may be infinite."""
        # `mix` gets the distribution with the smaller share first. In the other order, the small
        # divergence near an end of beta would be lost to rounding.
        if self.beta <= 0.5:
            return mix(entries.log_ratio, self.beta)
        log_q_over_m, log_m_over_p = mix(-entries.log_ratio, 1.0 - self.beta)
        return -log_m_over_p, -log_q_over_m


def mix(log_ratio: Array, share: float) -> tuple[Array, Array]:
    """Returns log a - log m and log m - log b for the mixture m = share a + (1 - share) b.

    Both are computed from the log-ratio alone:

        log m - log b = log1p(share expm1(log a - log b)).

    If the exponential would overflow, b is negligible in m, and log a - log m is -log(share).

    Args:
      log_ratio: log a - log b, from -inf to +inf.
      share: share of a in the mixture, between 0 and 1.
    """
    capped = jnp.minimum(log_ratio, _MAX_EXPONENT)
    log_m_over_b = jnp.log1p(share * jnp.expm1(capped))
    log_a_over_m = jnp.where(log_ratio > _MAX_EXPONENT, -math.log(share), capped - log_m_over_b)
    return log_a_over_m, log_m_over_b + jnp.maximum(log_ratio - _MAX_EXPONENT, 0.0)


@jax.custom_jvp
def times_log(probs: Array, logs: Array) -> Array:
    """Returns probs * logs, or 0 where `probs` is 0, even if `logs` is infinite there."""
    return jnp.where(probs > 0, probs * logs, 0.0)


@times_log.defjvp
def _times_log_derivative(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # Without this rule, reverse mode would multiply a cotangent of 0 by an infinite logarithm.
    (probs, logs), (probs_tangent, logs_tangent) = primals, tangents
    finite = jnp.where(probs > 0, logs, 0.0)
    tangent = jnp.where(probs > 0, finite * probs_tangent + probs * logs_tangent, 0.0)
    return times_log(probs, logs), tangent
