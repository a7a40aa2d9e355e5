"""Divergences that are sums of other divergences."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Float
from gkd_jax.objectives.divergences import Divergence, ForwardKL, ReverseKL, VocabularyEntries


@dataclasses.dataclass(frozen=True)
class EntropyAware(Divergence):
    """Reverse KL divergence, plus the forward KL at tokens where the teacher's entropy is high,

        KL(Q || P) + [H(P) >= threshold] forward_weight KL(P || Q).

    "Entropy-Aware On-Policy Distillation of Language Models" (arXiv 2603.07079). Where the teacher
    is certain, the student concentrates on one mode. Where the teacher is uncertain, the student
    learns all of the teacher's alternatives.

    Attributes:
      threshold: lowest entropy of the teacher, in nats, at which the forward KL is added; not
        negative.
      forward_weight: factor of the forward KL, above 0.

    Raises:
      ValueError: a setting is outside its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.EntropyAware(threshold=0.5)
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      0.2747
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
        """The reverse KL's term, plus the forward KL's weighted term if the entropy is high."""
        return ReverseKL().term(entries) + self._where_high(entries, ForwardKL().term(entries))

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """The reverse KL's slope, plus the forward KL's weighted slope if the entropy is high."""
        return ReverseKL().slope(entries) + self._where_high(entries, ForwardKL().slope(entries))

    def _where_high(self, entries: VocabularyEntries, forward: Array) -> Array:
        # `where` instead of a product: the forward KL may be infinite, and 0 * inf is NaN.
        is_high = entries.teacher_entropy >= self.threshold
        return jnp.where(is_high, self.forward_weight * forward, 0.0)


@dataclasses.dataclass(frozen=True)
class WeightedSum(Divergence):
    """Weighted sum of several divergences, for example of a KL and the cross-entropy.

    Attributes:
      divergences: the divergences to sum.
      weights: factor of each divergence, above 0.

    Raises:
      ValueError: there are no divergences, the number of weights differs from the number of
        divergences, or a weight is not above 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student, teacher = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
      >>> divergence = objectives.WeightedSum(
      ...     (objectives.ForwardKL(), objectives.NegativeLogLikelihood()), (0.3, 0.7)
      ... )
      >>> values = objectives.token_divergence(divergence, student, teacher, jnp.array([0]))
      >>> print(f"{values[0]:.4f}")
      1.0136
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
        """Whether any of the divergences needs a teacher."""
        return any(divergence.needs_teacher for divergence in self.divergences)

    @property
    def needs_advantages(self) -> bool:  # type: ignore[override]
        """Whether any of the divergences needs advantages."""
        return any(divergence.needs_advantages for divergence in self.divergences)

    @property
    def is_linear_in_teacher(self) -> bool:  # type: ignore[override]
        """Whether all of the divergences are linear in the teacher's probabilities."""
        return all(divergence.is_linear_in_teacher for divergence in self.divergences)

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """The weighted sum of the terms."""
        return self._sum(lambda divergence: divergence.term(entries))

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """The weighted sum of the slopes."""
        return self._sum(lambda divergence: divergence.slope(entries))

    def _sum(self, array_fn: Callable[[Divergence], Array]) -> Array:
        arrays = (w * array_fn(d) for w, d in zip(self.weights, self.divergences, strict=True))
        return functools.reduce(jnp.add, arrays)
