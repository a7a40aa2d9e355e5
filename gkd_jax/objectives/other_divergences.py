"""Further divergences, from other papers, and the sampled estimate of the reverse KL.

The base class and the divergences of the GKD paper are in `divergences`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Float
from gkd_jax.common.moved import load_moved
from gkd_jax.objectives.divergences import Divergence, VocabularyEntries, mix, times_log

# Bound on the rounding error of log p - log q in float32, relative to their magnitude: four units
# in the last place.
_ROUNDING = 4 * 2.0**-23


def _check_between(setting: str, value: float, remedy: str) -> None:
    if not (isinstance(value, (int, float)) and 0.0 < value < 1.0):
        raise ValueError(
            f"{setting} must be between 0 and 1, ends excluded; got {value!r}. {remedy}"
        )


@dataclasses.dataclass(frozen=True)
class TotalVariation(Divergence):
    """Total variation distance, from 0 to 1,

        TV(P, Q) = 1/2 sum of |p_v - q_v|.

    "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (f-distill,
    arXiv 2307.15190). The gradient is discontinuous at p_v = q_v, where the slope is set to 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.TotalVariation()
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.2500
    """

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """|p - q| / 2."""
        return 0.5 * jnp.abs(_teacher_minus_student(entries))

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q sign(q - p) / 2."""
        return -0.5 * entries.student_probs * jnp.sign(_teacher_minus_student(entries))


def _teacher_minus_student(entries: VocabularyEntries) -> Array:
    """Returns p - q, or exactly 0 where p and q differ by no more than a rounding error."""
    ratio = entries.log_ratio
    size = 1.0 + jnp.minimum(jnp.abs(entries.student_log_probs), 1e3)
    difference = entries.teacher_probs - entries.student_probs
    return jnp.where(jnp.abs(ratio) <= _ROUNDING * size, 0.0, difference)


@dataclasses.dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """Skew KL divergence, from the teacher to a mixture,

        KL(P || alpha P + (1 - alpha) Q).

    "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898).
    The divergence is at most -log(alpha), even if the student excludes an entry. Where q is far
    below p, its gradient is smaller than the gradient of the forward KL.

    Attributes:
      alpha: the teacher's share of the mixture, 0 < alpha < 1; DistiLLM takes 0.1.

    Raises:
      ValueError: `alpha` is not inside (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.SkewForwardKL(alpha=0.1)
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.1131
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_between("SkewForwardKL.alpha", self.alpha, "For alpha=0 use ForwardKL.")

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """p log(p / m) + (m - p), with m the mixture. It is never negative; m - p sums to 0."""
        log_p_over_m, _ = mix(entries.log_ratio, self.alpha)
        difference = (1.0 - self.alpha) * (entries.student_probs - entries.teacher_probs)
        return times_log(entries.teacher_probs, log_p_over_m) + difference

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """(1 - alpha) q (1 - p / m)."""
        log_p_over_m, _ = mix(entries.log_ratio, self.alpha)
        return -(1.0 - self.alpha) * entries.student_probs * jnp.expm1(log_p_over_m)


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """Skew reverse KL divergence, from the student to a mixture,

        KL(Q || alpha Q + (1 - alpha) P).

    "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898).
    It is at most -log(alpha), even if the teacher excludes an entry.

    Attributes:
      alpha: the student's share of the mixture, 0 < alpha < 1; DistiLLM takes 0.1.

    Raises:
      ValueError: `alpha` is not inside (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.SkewReverseKL(alpha=0.1)
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.1070
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_between("SkewReverseKL.alpha", self.alpha, "For alpha=0 use ReverseKL.")

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q log(q / m) + (m - q), with m the mixture. It is never negative; m - q sums to 0."""
        log_q_over_m, _ = mix(-entries.log_ratio, self.alpha)
        difference = (1.0 - self.alpha) * (entries.teacher_probs - entries.student_probs)
        return times_log(entries.student_probs, log_q_over_m) + difference

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q log(q / m) + alpha q (1 - q / m)."""
        student = entries.student_probs
        log_q_over_m, _ = mix(-entries.log_ratio, self.alpha)
        return times_log(student, log_q_over_m) - self.alpha * student * jnp.expm1(log_q_over_m)


@dataclasses.dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """Alpha divergence of Amari, in the form of Cressie and Read,

        (1 - sum of p_v^alpha q_v^(1 - alpha)) / (alpha (1 - alpha)).

    It tends to the forward KL as alpha tends to 1 and to the reverse KL as alpha tends to 0. With
    alpha = 1/2 it is 4 times the squared Hellinger distance.

    Attributes:
      alpha: exponent of the teacher's probabilities, 0 < alpha < 1.

    Raises:
      ValueError: `alpha` is not inside (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.AlphaDivergence(alpha=0.5)
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.1363
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
        is_near = jnp.abs(ratio) < 1.0
        near = -student * jnp.expm1(self.alpha * jnp.where(is_near, ratio, 0.0))
        far = student - jnp.exp(_log_product(entries, self.alpha))
        return jnp.where(is_near, near, far) / self.alpha


def _log_product(entries: VocabularyEntries, alpha: float) -> Array:
    """Returns log(p^alpha q^(1 - alpha)). The result is -inf if alpha < 1 and p or q is 0."""
    student, teacher = entries.student_log_probs, entries.checked_teacher_log_probs
    return alpha * teacher + (1.0 - alpha) * student


def _missing_product(entries: VocabularyEntries, alpha: float) -> Array:
    """Returns alpha p + (1 - alpha) q - p^alpha q^(1 - alpha) of each entry.

    Its sum over a row is 1 - sum of the products p^alpha q^(1 - alpha).
    """
    # Near p = q the three terms cancel almost entirely. With d = log(p / q), their sum is equal to
    # q (alpha expm1(d) - expm1(alpha d)), which keeps its precision.
    ratio = entries.log_ratio
    is_near = jnp.abs(ratio) < 1.0
    close = jnp.where(is_near, ratio, 0.0)
    near = alpha * jnp.expm1(close) - jnp.expm1(alpha * close)
    student, teacher = entries.student_probs, entries.teacher_probs
    far = alpha * teacher + (1.0 - alpha) * student - jnp.exp(_log_product(entries, alpha))
    return jnp.where(is_near, student * near, far)


@dataclasses.dataclass(frozen=True)
class RenyiDivergence(Divergence):
    """Rényi divergence of order alpha,

        D_alpha(P || Q) = log(sum of p_v^alpha q_v^(1 - alpha)) / (alpha - 1).

    "Rényi Divergence and Kullback-Leibler Divergence" (arXiv 1206.2459). It increases with alpha
    and tends to the forward KL as alpha tends to 1. For alpha below 1 the divergence is finite
    unless the supports are disjoint. For alpha above 1 it is +inf if the student excludes an entry
    to which the teacher gives probability.

    The divergence is the logarithm of a sum over entries, and not itself such a sum. Its gradient
    with respect to the student's logits is q_v - w_v, with w the distribution proportional to
    p^alpha q^(1 - alpha).

    Attributes:
      alpha: the order, above 0, finite and not 1.

    Raises:
      ValueError: `alpha` is outside this range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.RenyiDivergence(alpha=2.0)
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.2877
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
        """The divergence of the row, distributed over its entries in proportion to p."""
        value = self._log_sum(entries) / (self.alpha - 1.0)
        # The value may be infinite; its plain product with a probability of 0 would be NaN.
        return times_log(entries.teacher_probs, value)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """q - w, with w = p^alpha q^(1 - alpha) divided by its sum."""
        log_sum, student = self._log_sum(entries), entries.student_probs
        exponent = self.alpha * entries.log_ratio - log_sum
        is_near = jnp.abs(exponent) < 1.0
        near = -student * jnp.expm1(jnp.where(is_near, exponent, 0.0))
        far = student - jnp.exp(_log_product(entries, self.alpha) - log_sum)
        return jnp.where(is_near, near, far)

    def _log_sum(self, entries: VocabularyEntries) -> Float[Array, "*n 1"]:
        """Returns log(sum of p^alpha q^(1 - alpha)) of each row, exactly 0 where P = Q."""
        # Excluded entries have a finite log-probability (EXCLUDED_LOG_PROB). If all other products
        # are 0, the result would be that number instead of -inf.
        logs = jnp.where(entries.is_excluded, -jnp.inf, _log_product(entries, self.alpha))
        log_sum = jax.nn.logsumexp(logs, axis=-1, keepdims=True)
        # If the sum is near 1, its rounding makes the logarithm inaccurate. The logarithm is then
        # computed from 1 minus the sum, which `_missing_product` gives without cancellation.
        missing = jnp.sum(_missing_product(entries, self.alpha), axis=-1, keepdims=True)
        near = jnp.abs(log_sum) < 0.5
        return jnp.where(near, jnp.log1p(-jnp.where(near, missing, 0.0)), log_sum)


@dataclasses.dataclass(frozen=True)
class ClippedForwardKL(Divergence):
    """Forward KL divergence with the contribution of each entry clipped from above,

        sum of min(p_v log(p_v / q_v), limit).

    "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models" (OPSD,
    arXiv 2601.18734): without clipping, a few entries, often stylistic tokens, dominate the
    gradient. The clipped sum may be negative, so it is not a divergence in the strict sense.

    Attributes:
      limit: largest contribution of an entry, above 0; OPSD takes 0.05.

    Raises:
      ValueError: `limit` is not above 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.ClippedForwardKL(limit=0.05)
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      -0.1527
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
        """q - p, or only q for a clipped entry, whose term is constant."""
        contributions = times_log(entries.teacher_probs, entries.log_ratio)
        unclipped = jnp.where(contributions < self.limit, entries.teacher_probs, 0.0)
        return entries.student_probs - unclipped


@dataclasses.dataclass(frozen=True)
class SampledReverseKL(Divergence):
    """Reverse KL divergence estimated at the output token alone,

        log q_y - log p_y.

    For outputs sampled from the student this is an unbiased estimate of KL(Q || P). Its gradient is
    a policy gradient (score function), with the advantage A held fixed,

        -A grad log q_y,  A = log p_y - log q_y.

    For such outputs it is an unbiased estimate of the gradient of KL(Q || P). Both estimates are
    far noisier than `ReverseKL`, which sums over the vocabulary. Use this class only if a method
    knows nothing but the log-probability of the output token.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.SampledReverseKL()
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      -0.6931
    """

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-A at the output token, 0 elsewhere."""
        return jnp.where(entries.is_target, -entries.log_ratio, 0.0)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-A at the output token. This is not the derivative of the term, since A is held fixed."""
        return jax.lax.stop_gradient(self.term(entries))


def __getattr__(name: str) -> Any:
    """Returns a name that this module defined in earlier versions."""
    return load_moved(__name__, name)
