"""The reverse KL of whole outputs by policy gradient: MiniLLM's returns and importance weights.

KL(Q || P) of whole outputs is -E_{y~Q} sum_t r_t with r_t = log p_t - log q_t, and its gradient
splits in two (MiniLLM, arXiv 2306.08543, section 2.2). A token's own r_t gives, summed over the
vocabulary, the gradient of the reverse KL at that position: `ReverseKL`, exact. What follows it
gives -R_{t+1} grad log q_t, with the return R_{t+1}, the sum of r_u over u > t, held fixed:
`PolicyGradient`.
"""

import math

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Float


def returns_to_go(
    log_ratio: Float[Array, "B T"], loss_weights: Float[Array, "B T"], *, length_normalized: bool
) -> Float[Array, "B T"]:
    """R_{t+1}, what follows each token, as its advantage.

    Args:
      log_ratio: r_t = log p_t - log q_t of the output tokens; read where they count.
      loss_weights: 1 up to and including the end of an output, 0 after it.
      length_normalized: the mean of r_u over the tokens u > t that there are and not their sum,
        as MiniLLM's: otherwise long outputs have large returns, and the student learns to be short.

    Returns:
      Advantages without gradient; 0 on the last token of an output and behind it.
    """
    counts = loss_weights > 0
    own = jnp.where(counts, log_ratio, 0.0)
    following = _reversed_cumsum(own) - own
    if length_normalized:
        mask = counts.astype(own.dtype)
        following = following / jnp.maximum(_reversed_cumsum(mask) - mask, 1.0)
    is_followed = jnp.pad(counts[:, 1:], ((0, 0), (0, 1)))
    # Not a rounding away from 0 where nothing follows.
    return jax.lax.stop_gradient(jnp.where(counts & is_followed, following, 0.0))


def importance_weights(
    student_log_probs: Float[Array, "B T"],
    teacher_log_probs: Float[Array, "B T"],
    loss_weights: Float[Array, "B T"],
    *,
    teacher_share: float,
) -> Float[Array, "B T"]:
    """w_t = q_t / ((1 - s) q_t + s p_t), for outputs of the mixture with the teacher's share s.

    MiniLLM's approximation: the ratio of the token itself, without those of the tokens before it,
    whose product would vary too much. It is at most 1 / (1 - s), so nothing is clipped.

    Args:
      student_log_probs: log q of the output tokens.
      teacher_log_probs: log p of them.
      loss_weights: 0 where a token does not count.
      teacher_share: s, between 0 and 1.

    Returns:
      Weights without gradient; 1 where a token does not count.
    """
    mixture = jnp.logaddexp(
        math.log(1.0 - teacher_share) + student_log_probs,
        math.log(teacher_share) + teacher_log_probs,
    )
    weights = jnp.where(loss_weights > 0, jnp.exp(student_log_probs - mixture), 1.0)
    return jax.lax.stop_gradient(weights)


def _reversed_cumsum(values: Array) -> Array:
    """The sum of each entry and of all behind it."""
    return jax.lax.cumsum(values, axis=1, reverse=True)
