"""How far the loss in float32 may be from its exact value, derived from the arithmetic alone.

The bounds hold for every order of the sums and every choice of fused multiply-adds, so they do not
depend on the machine, its vector width or the mesh. Two computations of the same loss differ by
twice a bound at most. The rules are those of any text on rounding, to first order in the unit
u = 2^-24:

- A sum of n products is off by at most n u times the sum of their absolute values, however it is
  ordered.
- A function of inputs that are off by e_i is off by sum_i |df/dx_i| e_i. The derivatives are
  central differences in float64, so that no divergence needs a formula of its own.
- A handful of operations on a number x (an exponential, a logarithm, products: `OPERATIONS` of
  them) is off as if x were off by so many units of max(1, |x|).
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.objectives import VocabularyEntries
from gkd_jax.objectives.per_token import term_and_slope

UNIT = 2.0**-24
OPERATIONS = 16
"""The longest chain of elementwise operations from log-probabilities to a slope has about a dozen;
of these, log1p and expm1 may be off by two units."""


def loss_bounds(objective, arrays):
    """Bounds for `weighted_loss`: ((loss, per token), (gradients of hidden states, of the head)).

    Temperatures must be 1. Divergences with jumps (a threshold, the sign in total variation) are
    taken to have none within rounding of `arrays`.

    Args:
      objective: its divergence and z-loss.
      arrays: float32 `hidden`, `head`, `teacher_hidden`, `teacher_head`, `targets`, `advantages`
        and `weights`.
    """
    hidden, head, weights = (np.float64(arrays[name]) for name in ("hidden", "head", "weights"))
    student, of_student, of_log_z, log_z = _log_probs(hidden, head)
    teacher, of_teacher, *_ = _log_probs(
        np.float64(arrays["teacher_hidden"]), np.float64(arrays["teacher_head"])
    )
    vocab_size = student.shape[-1]
    # At each token: the sum of terms, and g_v = f'_v - q_v sum_u f'_u.
    value_fn = functools.partial(_value_and_gradient, objective.divergence, arrays)
    value, gradient, sizes = value_fn(student, teacher)
    of_value, of_gradient = _propagated(value_fn, student, teacher, of_student, of_teacher)
    per_token = of_value + vocab_size * UNIT * sizes.value
    of_gradient = of_gradient + (vocab_size + OPERATIONS) * UNIT * sizes.gradient
    # The z-loss: z log^2 Z, and 2 z log Z q_v in the gradient.
    z_loss, probs = objective.z_loss, np.exp(student)
    squared = z_loss * log_z[..., 0] ** 2
    of_loss = per_token + 2 * z_loss * (log_z * of_log_z)[..., 0] + OPERATIONS * UNIT * squared
    of_gradient += 2 * z_loss * probs * (of_log_z + log_z * (of_student + OPERATIONS * UNIT))
    gradient = gradient + 2 * z_loss * log_z * probs
    value = np.abs(value) + squared
    num_tokens = weights.size
    loss = np.sum(weights * (of_loss + (num_tokens + 2) * UNIT * value))
    # Into the output layer: sums over the vocabulary, and over the tokens.
    of_gradient = weights[..., None] * (of_gradient + 2 * UNIT * np.abs(gradient))
    gradient = weights[..., None] * np.abs(gradient)
    of_hidden = (of_gradient + vocab_size * UNIT * gradient) @ np.abs(head).T
    of_head = np.einsum("btd,btv->dv", np.abs(hidden), of_gradient + num_tokens * UNIT * gradient)
    return (loss, np.where(weights > 0, per_token, 0.0)), (of_hidden, of_head)


def assert_within_rounding(one, other, objective, arrays):
    """Two results of the loss differ by no more than twice `loss_bounds`.

    The bounds themselves must be small: a sum or an array in bfloat16, whose unit is 2^-9, is
    further off than that.
    """
    leaves = (jax.tree.leaves(tree) for tree in (one, other, loss_bounds(objective, arrays)))
    for left, right, bound in zip(*leaves, strict=True):
        assert np.max(bound) < 2.0**-11 * np.max(np.abs(right))
        assert np.all(np.abs(left - right) <= 2 * bound)


def _log_probs(hidden, head):
    """log softmax of hidden @ head in float64; bounds for it in float32, and for log Z; log Z."""
    logits = hidden @ head
    of_logits = hidden.shape[-1] * UNIT * (np.abs(hidden) @ np.abs(head))
    highest = logits.max(-1, keepdims=True)
    log_z = highest + np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    log_probs = logits - log_z
    # log Z is a mean of the logits' errors; its own sum has as many terms as the vocabulary.
    rounding = UNIT * (logits.shape[-1] + OPERATIONS * (1 + np.abs(log_z)))
    of_log_z = np.sum(np.exp(log_probs) * of_logits, -1, keepdims=True) + rounding
    own = OPERATIONS * UNIT * (1 + np.abs(log_probs))
    return log_probs, of_logits + of_log_z + own, of_log_z, np.abs(log_z)


@functools.partial(jax.jit, static_argnums=0)
def _terms(divergence, student, teacher, is_target, advantages):
    teacher = teacher if divergence.needs_teacher else None
    advantages = advantages if divergence.needs_advantages else None
    entries = VocabularyEntries(student, teacher, is_target, advantages)
    return term_and_slope(divergence, entries)


def _value_and_gradient(divergence, arrays, student, teacher):
    """Of each token in float64, and the sums of absolute values that they are made of."""
    is_target = arrays["targets"][..., None] == np.arange(student.shape[-1])
    advantages = np.float64(arrays["advantages"])[..., None]
    with jax.enable_x64(True):
        term, slope = map(
            np.asarray,
            _terms(divergence, *map(jnp.asarray, (student, teacher, is_target, advantages))),
        )
    probs = np.exp(student)
    gradient = slope - probs * slope.sum(-1, keepdims=True)
    size = np.abs(slope) + probs * np.abs(slope).sum(-1, keepdims=True)
    return term.sum(-1), gradient, types.SimpleNamespace(value=np.abs(term).sum(-1), gradient=size)


def _propagated(value_fn, student, teacher, of_student, of_teacher, step=1e-6):
    """What errors of the log-probabilities do to values and gradients."""
    of_value, of_gradient = np.zeros(student.shape[:-1]), np.zeros(student.shape)
    for which, errors in enumerate((of_student, of_teacher)):
        for entry in range(student.shape[-1]):
            found = []
            for sign in (1, -1):
                both = [student, teacher]
                both[which] = both[which] + sign * step * (np.arange(student.shape[-1]) == entry)
                found.append(value_fn(*both))
            error = errors[..., entry]
            of_value += np.abs(found[0][0] - found[1][0]) / (2 * step) * error
            change = np.abs(found[0][1] - found[1][1]) / (2 * step)
            of_gradient += change * error[..., None]
    return of_value, of_gradient
