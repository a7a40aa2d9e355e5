"""Divergences of GKD's rivals and siblings, in the same form as those of `divergences`."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Float
from gkd_jax.objectives.divergences import (
    Divergence,
    ForwardKL,
    ReverseKL,
    VocabularyEntries,
    mix,
    times_log,
)

# Log-ratios of float32 log-probabilities are rounded by some units in the last place of the larger.
_ROUNDING = 4 * 2.0**-23


def _check_between(setting: str, value: float, remedy: str) -> None:
    if not (isinstance(value, (int, float)) and 0.0 < value < 1.0):
        raise ValueError(
            f"{setting} must be between 0 and 1, ends excluded; got {value!r}. {remedy}"
        )


@dataclasses.dataclass(frozen=True)
class TotalVariation(Divergence):
    """TV(P, Q) = 1/2 sum of |p_v - q_v|, from 0 to 1.

    "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (f-distill,
    arXiv 2307.15190). Its slope jumps where p_v = q_v, and is 0 there.
    """

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """|p - q| / 2."""
        return 0.5 * jnp.abs(_teacher_minus_student(entries))

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q sign(q - p) / 2."""
        return -0.5 * entries.student_probs * jnp.sign(_teacher_minus_student(entries))


def _teacher_minus_student(entries: VocabularyEntries) -> Array:
    """p - q, which is exactly 0 where they differ by no more than rounding."""
    ratio = entries.log_ratio
    size = 1.0 + jnp.minimum(jnp.abs(entries.student_log_probs), 1e3)
    difference = entries.teacher_probs - entries.student_probs
    return jnp.where(jnp.abs(ratio) <= _ROUNDING * size, 0.0, difference)


@dataclasses.dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(P || alpha P + (1 - alpha) Q): the skew KL divergence.

    "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898).
    Finite, at most -log(alpha), also where the student excludes an entry; its gradient is smaller
    than that of the forward KL where q is far below p.

    Attributes:
      alpha: the teacher's share of the mixture, 0 < alpha < 1; DistiLLM takes 0.1.

    Raises:
      ValueError: alpha is not inside (0, 1).
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_between("SkewForwardKL.alpha", self.alpha, "For alpha=0 use ForwardKL.")

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """p log(p / m) + (m - p), which is never negative; the bracket sums to 0."""
        log_p_over_m, _ = mix(entries.log_ratio, self.alpha)
        of_mixture = (1.0 - self.alpha) * (entries.student_probs - entries.teacher_probs)
        return times_log(entries.teacher_probs, log_p_over_m) + of_mixture

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """(1 - alpha) q (1 - p / m)."""
        log_p_over_m, _ = mix(entries.log_ratio, self.alpha)
        return -(1.0 - self.alpha) * entries.student_probs * jnp.expm1(log_p_over_m)


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(Q || alpha Q + (1 - alpha) P): the skew reverse KL divergence.

    "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898).
    Finite, at most -log(alpha), also where the teacher excludes an entry.

    Attributes:
      alpha: the student's share of the mixture, 0 < alpha < 1; DistiLLM takes 0.1.

    Raises:
      ValueError: alpha is not inside (0, 1).
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_between("SkewReverseKL.alpha", self.alpha, "For alpha=0 use ReverseKL.")

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q log(q / m) + (m - q), which is never negative; the bracket sums to 0."""
        log_q_over_m, _ = mix(-entries.log_ratio, self.alpha)
        of_mixture = (1.0 - self.alpha) * (entries.teacher_probs - entries.student_probs)
        return times_log(entries.student_probs, log_q_over_m) + of_mixture

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q log(q / m) + alpha q (1 - q / m)."""
        student = entries.student_probs
        log_q_over_m, _ = mix(-entries.log_ratio, self.alpha)
        return times_log(student, log_q_over_m) - self.alpha * student * jnp.expm1(log_q_over_m)


@dataclasses.dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """(1 - sum of p^alpha q^(1 - alpha)) / (alpha (1 - alpha)), from the teacher's side.

    Amari's family in the form of Cressie and Read: it tends to the forward KL as alpha tends to 1
    and to the reverse KL as alpha tends to 0; alpha = 1/2 is 4 times the squared Hellinger
    distance.

    Attributes:
      alpha: 0 < alpha < 1.

    Raises:
      ValueError: alpha is not inside (0, 1).
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_between(
            "AlphaDivergence.alpha", self.alpha, "The ends are ForwardKL (1) and ReverseKL (0)."
        )

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """(alpha p + (1 - alpha) q - p^alpha q^(1 - alpha)) / (alpha (1 - alpha))."""
        return _missing_product(entries, self.alpha) / (self.alpha * (1.0 - self.alpha))

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """(q - p^alpha q^(1 - alpha)) / alpha."""
        ratio, student = entries.log_ratio, entries.student_probs
        near = jnp.abs(ratio) < 1.0
        of_close = -student * jnp.expm1(self.alpha * jnp.where(near, ratio, 0.0))
        of_far = student - jnp.exp(_log_product(entries, self.alpha))
        return jnp.where(near, of_close, of_far) / self.alpha


def _log_product(entries: VocabularyEntries, alpha: float) -> Array:
    """log(p^alpha q^(1 - alpha)); for alpha < 1 -inf if either probability is 0."""
    student, teacher = entries.student_log_probs, entries.checked_teacher_log_probs
    return alpha * teacher + (1.0 - alpha) * student


def _missing_product(entries: VocabularyEntries, alpha: float) -> Array:
    """alpha p + (1 - alpha) q - p^alpha q^(1 - alpha), which sums to 1 - sum of the products."""
    # Near p = q the three cancel: q times the difference of two expm1 keeps the digits.
    ratio = entries.log_ratio
    near = jnp.abs(ratio) < 1.0
    close = jnp.where(near, ratio, 0.0)
    of_close = alpha * jnp.expm1(close) - jnp.expm1(alpha * close)
    student, teacher = entries.student_probs, entries.teacher_probs
    of_far = alpha * teacher + (1.0 - alpha) * student - jnp.exp(_log_product(entries, alpha))
    return jnp.where(near, student * of_close, of_far)


@dataclasses.dataclass(frozen=True)
class RenyiDivergence(Divergence):
    """Rényi divergence of order alpha, from the teacher's side.

        D_alpha(P || Q) = log(sum of p_v^alpha q_v^(1 - alpha)) / (alpha - 1)

    "Rényi Divergence and Kullback-Leibler Divergence" (arXiv 1206.2459). It rises with alpha, and
    tends to the forward KL as alpha tends to 1. Orders below 1 are finite unless the supports are
    disjoint; orders above 1 are +inf if the student excludes an entry to which the teacher gives
    probability.

    It is a function of the sum over a whole row, not itself a sum over entries. Its gradient in
    the student's logits is q_v - w_v, where w is the distribution proportional to
    p^alpha q^(1 - alpha).

    Attributes:
      alpha: the order, above 0 and not 1.

    Raises:
      ValueError: alpha is not such a number.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        is_number = isinstance(self.alpha, (int, float)) and 0.0 < self.alpha < math.inf
        if not is_number or self.alpha == 1.0:
            raise ValueError(
                f"RenyiDivergence.alpha must be above 0, finite and not 1; got {self.alpha!r}. "
                "For alpha=1 use ForwardKL, the limit."
            )

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """The divergence of the row, split among its entries in proportion to p."""
        value = self._log_sum(entries) / (self.alpha - 1.0)
        # Not a factor of 0: the value may be infinite.
        return times_log(entries.teacher_probs, value)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q - w, with w = p^alpha q^(1 - alpha) divided by its sum."""
        log_sum, student = self._log_sum(entries), entries.student_probs
        exponent = self.alpha * entries.log_ratio - log_sum
        near = jnp.abs(exponent) < 1.0
        of_near = -student * jnp.expm1(jnp.where(near, exponent, 0.0))
        of_far = student - jnp.exp(_log_product(entries, self.alpha) - log_sum)
        return jnp.where(near, of_near, of_far)

    def _log_sum(self, entries: VocabularyEntries) -> Float[Array, "*n 1"]:
        """log of the sum of p^alpha q^(1 - alpha) over each row, exactly 0 where P = Q."""
        # If every product is 0, finite log-probabilities of excluded entries must not be left.
        logs = jnp.where(entries.is_excluded, -jnp.inf, _log_product(entries, self.alpha))
        log_sum = jax.nn.logsumexp(logs, axis=-1, keepdims=True)
        # Near a sum of 1 its logarithm has no digits left but those of its distance from 1.
        missing = jnp.sum(_missing_product(entries, self.alpha), axis=-1, keepdims=True)
        near = jnp.abs(log_sum) < 0.5
        return jnp.where(near, jnp.log1p(-jnp.where(near, missing, 0.0)), log_sum)


@dataclasses.dataclass(frozen=True)
class ClippedForwardKL(Divergence):
    """Sum of min(p_v log(p_v / q_v), limit): the forward KL with each entry clipped from above.

    "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models" (OPSD,
    arXiv 2601.18734): without the clipping a few entries, often of style, make up the gradient.
    Not a divergence in the strict sense, since it may be negative.

    Attributes:
      limit: the most that an entry may contribute, above 0; OPSD takes 0.05.

    Raises:
      ValueError: the limit is not above 0.
    """

    limit: float = 0.05

    def __post_init__(self) -> None:
        if not (isinstance(self.limit, (int, float)) and self.limit > 0.0):
            raise ValueError(
                f"ClippedForwardKL.limit must be above 0; got {self.limit!r}. Set it to 0.05, or "
                "use ForwardKL for none."
            )

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """min(p d, limit)."""
        return jnp.minimum(times_log(entries.teacher_probs, entries.log_ratio), self.limit)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q - p, and q where the entry is clipped: its own slope is 0."""
        of_entry = times_log(entries.teacher_probs, entries.log_ratio)
        counted = jnp.where(of_entry < self.limit, entries.teacher_probs, 0.0)
        return entries.student_probs - counted


@dataclasses.dataclass(frozen=True)
class EntropyAware(Divergence):
    """Reverse KL, and forward KL besides where the teacher's entropy is high.

    "Entropy-Aware On-Policy Distillation of Language Models" (arXiv 2603.07079). Seeks a mode where
    the teacher is sure, and keeps to its alternatives where it is not.

    Attributes:
      threshold: teacher's entropy in nats from which the forward KL is added; not negative.
      forward_weight: its factor, above 0.

    Raises:
      ValueError: a setting is outside its range.
    """

    threshold: float
    forward_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("threshold", "not negative"), ("forward_weight", "above 0")):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if not (is_number and (value > 0.0 or (name == "threshold" and value == 0.0))):
                raise ValueError(
                    f"EntropyAware.{name} must be {least}; got {value!r}. Set it to such a number."
                )

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """The reverse KL's term, plus the forward KL's where the entropy is high."""
        return ReverseKL().term(entries) + self._where_high(entries, ForwardKL().term(entries))

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """The two slopes, likewise."""
        return ReverseKL().slope(entries) + self._where_high(entries, ForwardKL().slope(entries))

    def _where_high(self, entries: VocabularyEntries, of_forward: Array) -> Array:
        # Not a factor of 0: the forward KL may be infinite.
        is_high = entries.teacher_entropy >= self.threshold
        return jnp.where(is_high, self.forward_weight * of_forward, 0.0)


@dataclasses.dataclass(frozen=True)
class WeightedSum(Divergence):
    """Sum of several divergences, each with a factor: for example KL plus cross-entropy.

    Attributes:
      divergences: which.
      weights: one factor for each, above 0.

    Raises:
      ValueError: there are none, not as many weights, or a weight that is not above 0.
    """

    divergences: tuple[Divergence, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergences", tuple(self.divergences))
        object.__setattr__(self, "weights", tuple(self.weights))
        positive = all(isinstance(w, (int, float)) and 0.0 < w < math.inf for w in self.weights)
        if not self.divergences or len(self.weights) != len(self.divergences) or not positive:
            raise ValueError(
                "WeightedSum needs one or more divergences, and a weight above 0 for each; got "
                f"{self.divergences} and {self.weights}. Set both WeightedSum.divergences and "
                "WeightedSum.weights."
            )

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether any of them does."""
        return any(divergence.needs_teacher for divergence in self.divergences)

    @property
    def needs_advantages(self) -> bool:  # type: ignore[override]
        """Whether any of them does."""
        return any(divergence.needs_advantages for divergence in self.divergences)

    @property
    def is_linear_in_teacher(self) -> bool:  # type: ignore[override]
        """Whether all of them are."""
        return all(divergence.is_linear_in_teacher for divergence in self.divergences)

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """The weighted sum of their terms."""
        return self._sum(lambda divergence: divergence.term(entries))

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """The weighted sum of their slopes."""
        return self._sum(lambda divergence: divergence.slope(entries))

    def _sum(self, part: Callable[[Divergence], Array]) -> Array:
        parts = (w * part(d) for w, d in zip(self.weights, self.divergences, strict=True))
        return functools.reduce(jnp.add, parts)


@dataclasses.dataclass(frozen=True)
class SampledReverseKL(Divergence):
    """The reverse KL estimated at the output token alone, with the gradient of a policy's return.

    For outputs that the student has sampled: log q_y - log p_y is an unbiased estimate of
    KL(Q || P), and -A grad log q_y, with the advantage A = log p_y - log q_y held fixed, one of
    its gradient (the score function). Far noisier than `ReverseKL`, which sums over the
    vocabulary; it is what methods use that see one token's probability only.
    """

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-A on the output token, 0 elsewhere."""
        return jnp.where(entries.is_target, -entries.log_ratio, 0.0)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-A on the output token: no derivative of the term, whose logarithm is held fixed."""
        return jax.lax.stop_gradient(self.term(entries))
