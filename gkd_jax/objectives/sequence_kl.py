"""Reverse KL of whole outputs by policy gradient: MiniLLM's returns and importance weights.

With r_t = log p_t - log q_t at the output token t, the reverse KL of whole outputs is

    KL(Q || P) = -E_{y~Q} sum over t of r_t.

The gradient of this KL at a position t has two parts ("MiniLLM: Knowledge Distillation of Large
Language Models", arXiv 2306.08543, section 2.2):

- the gradient of the reverse KL of the next-token distributions at t, exact over the vocabulary,
  which `ReverseKL` computes;
- the policy gradient -R_{t+1} grad log q_t, which `PolicyGradient` computes. The return R_{t+1} is
  the sum of r_u over the tokens u > t and is held fixed.
"""

import math

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Float


def returns_to_go(
    log_ratio: Float[Array, "B T"], loss_weights: Float[Array, "B T"], *, length_normalized: bool
) -> Float[Array, "B T"]:
    """Computes the advantage of each token t: the return R_{t+1} of the tokens after t.

    Args:
      log_ratio: r_t = log p_t - log q_t of the output tokens; only tokens with weight are used.
      loss_weights: 1 up to and including the end of an output, 0 after it.
      length_normalized: whether to take the mean of r_u over the tokens u > t, as MiniLLM does,
        instead of the sum. Since r_u is negative on average, sums give long outputs lower returns,
        and the student would learn to write short outputs.

    Returns:
      Advantages without gradient; 0 on the last token of an output and after it.
    """
    mask = loss_weights > 0
    own = jnp.where(mask, log_ratio, 0.0)
    following = _reversed_cumsum(own) - own
    if length_normalized:
        ones = mask.astype(own.dtype)
        following = following / jnp.maximum(_reversed_cumsum(ones) - ones, 1.0)
    is_followed = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    # If no token follows, the result must be exactly 0, without a rounding error.
    return jax.lax.stop_gradient(jnp.where(mask & is_followed, following, 0.0))


def importance_weights(
    student_log_probs: Float[Array, "B T"],
    teacher_log_probs: Float[Array, "B T"],
    loss_weights: Float[Array, "B T"],
    *,
    teacher_share: float,
) -> Float[Array, "B T"]:
    """Computes importance weights for outputs sampled from a mixture of student and teacher,

        w_t = q_t / ((1 - s) q_t + s p_t).

    This is MiniLLM's approximation. The exact weight of a token would be the product of this ratio
    over the token and all earlier tokens, but that product has too high a variance. A weight is at
    most 1 / (1 - s), so weights are not clipped.

    Args:
      student_log_probs: log q of the output tokens.
      teacher_log_probs: log p of the output tokens.
      loss_weights: 0 at tokens without weight.
      teacher_share: the teacher's share s of the mixture, between 0 and 1.

    Returns:
      Weights without gradient; 1 at tokens without weight.
    """
    mixture = jnp.logaddexp(
        math.log(1.0 - teacher_share) + student_log_probs,
        math.log(teacher_share) + teacher_log_probs,
    )
    weights = jnp.where(loss_weights > 0, jnp.exp(student_log_probs - mixture), 1.0)
    return jax.lax.stop_gradient(weights)


def _reversed_cumsum(values: Array) -> Array:
    """Returns the sum of each entry and all entries after it."""
    return jax.lax.cumsum(values, axis=1, reverse=True)
