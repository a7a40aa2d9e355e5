"""Policy gradient of rewards, as an additional term of the loss at each output token.

Together with a divergence, the policy gradient forms the objective of RL with GKD
(`with_policy_gradient`) or of MiniLLM (`with_returns`).
"""

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
    """The policy gradient (score function) of an expected return, as a loss of value 0,

        gradient = -A grad log q_y.

    The outputs must be sampled from the student: y is the sampled token and A its advantage, which
    is held fixed. The expected value of this gradient is the gradient of minus the expected return,
    even if a baseline that does not depend on y was subtracted from the return. The value of the
    loss is 0, because the return cannot be computed from the advantages of single tokens. The code
    that computes the advantages also reports the return.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> _, gradient = objectives.divergence_and_gradient(
      ...     objectives.PolicyGradient(),
      ...     jnp.log(jnp.array([[0.25, 0.75]])),
      ...     None,
      ...     jnp.array([0]),
      ...     advantages=jnp.array([2.0]),
      ... )
      >>> print(" ".join(f"{value:.2f}" for value in gradient[0]))
      -1.50 1.50
    """

    needs_teacher: ClassVar[bool] = False
    needs_advantages: ClassVar[bool] = True

    def term(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """0 everywhere."""
        return jnp.zeros_like(entries.student_log_probs)

    def slope(self, entries: VocabularyEntries) -> Float[Array, "*n V"]:
        """-A at the output token, 0 elsewhere."""
        assert entries.advantages is not None, "a divergence that reads them needs_advantages"
        return jnp.where(entries.is_target, -entries.advantages, 0.0)


def with_policy_gradient(objective: Objective, alpha: float) -> Objective:
    """Adds a policy gradient to an objective: RL with GKD.

    GKD (arXiv 2306.13649) maximises

        E_x[(1 - alpha) E_{y~Q}[r(y)] - alpha E_{y~Q}[D(P || Q)(y|x)]].

    The resulting objective is minimised instead: alpha D plus (1 - alpha) `PolicyGradient`.

    Args:
      objective: objective whose divergence is D. Its other settings are kept.
      alpha: weight of D, from 0 to 1. With 1 the objective is returned unchanged. With 0 the
        resulting objective has neither D nor a teacher.

    Returns:
      An objective that needs advantages, unless `alpha` is 1.
    """
    if alpha == 1.0:
        return objective
    divergence: Divergence = PolicyGradient()
    if alpha > 0.0:
        divergence = WeightedSum((objective.divergence, divergence), (alpha, 1.0 - alpha))
    # An objective without a teacher must have a teacher temperature of 1.
    teacher_temperature = objective.teacher_temperature if divergence.needs_teacher else 1.0
    return dataclasses.replace(
        objective, divergence=divergence, teacher_temperature=teacher_temperature
    )


def with_returns(objective: Objective) -> Objective:
    """Adds a policy gradient to an objective, with weight 1: MiniLLM.

    If the objective's divergence is `ReverseKL` and the advantages are computed by `returns_to_go`,
    the sum is MiniLLM's gradient (arXiv 2306.08543).

    Returns:
      An objective that needs advantages.
    """
    divergence = WeightedSum((objective.divergence, PolicyGradient()), (1.0, 1.0))
    return dataclasses.replace(objective, divergence=divergence)


def divergence_alone(
    divergence: Divergence, per_token: Float[Array, "B T"]
) -> Float[Array, "B T"] | None:
    """Computes D per token if `divergence` is a weighted sum of D and `PolicyGradient`.

    `with_policy_gradient` builds such a sum. Since `PolicyGradient` has value 0, D is `per_token`
    divided by the weight of D. Returns None if `divergence` is D alone or `PolicyGradient` alone.
    """
    if not (isinstance(divergence, WeightedSum) and len(divergence.divergences) == 2):
        return None
    if not isinstance(divergence.divergences[1], PolicyGradient):
        return None
    return per_token / divergence.weights[0]


def token_advantages(
    advantages: Float[Array, " B"], loss_weights: Float[Array, "B T"], *, reduction: Reduction
) -> Float[Array, "B T"]:
    """Distributes the advantages of outputs over their tokens, undoing the loss's reduction.

    The policy gradient of an output is A * sum over t of grad log q_t. The gradient of a batch is
    the mean of these gradients over outputs. The reduction of the loss divides by other numbers;
    'per_sequence', for example, also divides by the length of the output. The advantage of each
    token is multiplied by a factor that compensates for this division.

    Args:
      advantages: advantage of each output.
      loss_weights: loss weights of the whole global batch: 1 at tokens that count, 0 elsewhere.
      reduction: reduction of the objective.

    Returns:
      float32 advantages per token, without gradient; 0 at tokens without weight.
    """
    weights = final_weights(loss_weights, reduction=reduction)
    mask = weights > 0
    num_outputs = jnp.sum(jnp.any(mask, axis=1).astype(jnp.float32))
    scale = jnp.where(mask, 1.0 / (jnp.where(mask, weights, 1.0) * num_outputs), 0.0)
    return jax.lax.stop_gradient(advantages.astype(jnp.float32)[:, None] * scale)
