"""Rewards in the loss: the policy gradient as one more term on the output token."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Float
from gkd_jax.objectives.divergence_sums import WeightedSum
from gkd_jax.objectives.divergences import Divergence, VocabularyEntries
from gkd_jax.objectives.objective import Objective, Reduction, final_weights


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Divergence):
    """The gradient -A grad log q_y of minus a return, by the score function; its value is 0.

    For outputs that the student has sampled: y is the sampled token and A its advantage, which is
    held fixed. The mean is the gradient of minus the expected return, whatever was subtracted
    from the return that did not depend on y. What the return is itself, the advantages of single
    tokens do not tell: it is measured where they are made.
    """

    needs_teacher: ClassVar[bool] = False
    needs_advantages: ClassVar[bool] = True

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """0."""
        return jnp.zeros_like(entries.student_log_probs)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-A on the output token, 0 elsewhere."""
        assert entries.advantages is not None, "a divergence that reads them needs_advantages"
        return jnp.where(entries.is_target, -entries.advantages, 0.0)


def with_policy_gradient(objective: Objective, alpha: float) -> Objective:
    """alpha D, and (1 - alpha) times the gradient of minus the return: RL with GKD, negated.

    GKD (arXiv 2306.13649) maximises E_x[(1 - alpha) E_{y~Q}[r(y)] - alpha E_{y~Q}[D(P || Q)(y|x)]].

    Args:
      objective: its divergence is D; all other settings stay as they are.
      alpha: from 0 to 1. 1 gives the objective itself, 0 leaves D and with it the teacher out.

    Returns:
      An objective that needs advantages, unless alpha is 1.
    """
    if alpha == 1.0:
        return objective
    divergence: Divergence = PolicyGradient()
    if alpha > 0.0:
        divergence = WeightedSum((objective.divergence, divergence), (alpha, 1.0 - alpha))
    # No teacher, no temperature of it.
    teacher_temperature = objective.teacher_temperature if divergence.needs_teacher else 1.0
    return dataclasses.replace(
        objective, divergence=divergence, teacher_temperature=teacher_temperature
    )


def with_returns(objective: Objective) -> Objective:
    """D and the gradient of minus the return: with `ReverseKL` the two parts of MiniLLM's gradient.

    Returns:
      An objective that needs advantages.
    """
    divergence = WeightedSum((objective.divergence, PolicyGradient()), (1.0, 1.0))
    return dataclasses.replace(objective, divergence=divergence)


def divergence_alone(
    divergence: Divergence, per_token: Float[Array, "B T"]
) -> Float[Array, "B T"] | None:
    """D per token, from the values alpha D of what `with_policy_gradient` made of it.

    None where the divergence is not such a sum: it is D itself, or has none.
    """
    if not (isinstance(divergence, WeightedSum) and len(divergence.divergences) == 2):
        return None
    if not isinstance(divergence.divergences[1], PolicyGradient):
        return None
    return per_token / divergence.weights[0]


def token_advantages(
    advantages: Float[Array, " B"], loss_weights: Float[Array, "B T"], *, reduction: Reduction
) -> Float[Array, "B T"]:
    """An advantage for every token, such that the reduced loss is that of whole outputs.

    An output's policy gradient is A sum_t grad log q_t, averaged over outputs. The reduction of the
    loss is a mean over tokens (of each output, or of all), and what it divides by is put back here:
    with 'per_sequence' an output's length.

    Args:
      advantages: of each output.
      loss_weights: 1 where a token counts, of the whole global batch.
      reduction: that of the objective.

    Returns:
      float32 advantages per token, without gradient; 0 where a token does not count.
    """
    weights = final_weights(loss_weights, reduction=reduction)
    counts = weights > 0
    num_outputs = jnp.sum(jnp.any(counts, axis=1).astype(jnp.float32))
    scale = jnp.where(counts, 1.0 / (jnp.where(counts, weights, 1.0) * num_outputs), 0.0)
    return jax.lax.stop_gradient(advantages.astype(jnp.float32)[:, None] * scale)
