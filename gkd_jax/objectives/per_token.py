"""Divergence per token and its gradient, computed from logits for any `Divergence`.

The functions normalise logits, apply temperatures, sum the terms of a `Divergence` over the
vocabulary, and compute the gradient from its slopes.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Float, Int
from gkd_jax.common.batch import TeacherDistributions
from gkd_jax.objectives.buckets import Buckets
from gkd_jax.objectives.divergences import EXCLUDED_LOG_PROB, Divergence, VocabularyEntries

TokenTeacher: TypeAlias = Float[Array, "*n V"] | TeacherDistributions
"""A teacher's logits, or its stored distributions."""


def token_divergence(
    divergence: Divergence,
    student_logits: Float[Array, "*n V"],
    teacher: TokenTeacher | None,
    targets: Int[Array, "*n"],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    advantages: Float[Array, "*n"] | None = None,
) -> Float[Array, "*n"]:
    """Computes the divergence of each token,

        D(P || Q),  P = softmax(teacher / tau_t),  Q = softmax(student / tau_s).

    It is differentiable in the student's logits; the teacher's logits get no gradient. No factor
    tau^2 is applied. An entry whose logits are -inf in both models contributes 0. A token whose
    cotangent is 0 has gradient 0, even if its divergence is infinite.

    If the teacher stores only some entries, both distributions are bucketed before they are
    compared: one bucket for each stored entry, and one for all others (`buckets`). The student's
    softmax is still over its whole vocabulary.

    Args:
      divergence: the divergence to compute.
      student_logits: logits of the student, before any temperature.
      teacher: logits of the teacher, before any temperature; or its stored distributions, to which
        the temperature was already applied; None if and only if the divergence needs no teacher.
      targets: output tokens; only the negative log-likelihood and sampled estimates read them.
      student_temperature: number above 0 by which the student's logits are divided.
      teacher_temperature: number above 0 by which the teacher's logits are divided.
      advantages: advantages of the output tokens, without gradient; None if and only if the
        divergence does not need them.

    Returns:
      The divergence per token in nats, float32 (or wider, if the logits are).

    Raises:
      ValueError: the teacher or the advantages are missing or not needed, or shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> student = jnp.array([[0.0, 1.0], [2.0, 2.0]])
      >>> teacher = jnp.array([[0.0, 0.0], [3.0, 3.0]])
      >>> values = objectives.token_divergence(
      ...     objectives.ForwardKL(), student, teacher, jnp.array([0, 1])
      ... )
      >>> print(f"{values[0]:.4f} {values[1]:.4f}")
      0.1201 0.0000
    """
    _check(divergence, student_logits, teacher, targets)
    check_advantages(divergence, advantages, targets)
    temperatures = (float(student_temperature), float(teacher_temperature))
    constants = jax.lax.stop_gradient((teacher, targets, advantages))
    return _token_divergence(divergence, temperatures, student_logits, constants)


def divergence_and_gradient(
    divergence: Divergence,
    student_logits: Float[Array, "*n V"],
    teacher: TokenTeacher | None,
    targets: Int[Array, "*n"],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    advantages: Float[Array, "*n"] | None = None,
) -> tuple[Float[Array, "*n"], Float[Array, "*n V"]]:
    """Computes `token_divergence` and its gradient in the student's logits in one pass.

    With the slopes f'_v = df/d log q_v the gradient is

        (f'_v - q_v * sum over u of f'_u) / tau_s.

    Use this function in losses that compute their gradients in the forward pass. Other losses
    differentiate `token_divergence`, which takes the same arguments.

    Returns:
      The divergence per token, and its gradient per logit, in the same dtype.

    Raises:
      ValueError: for the same reasons as `token_divergence`.
    """
    _check(divergence, student_logits, teacher, targets)
    check_advantages(divergence, advantages, targets)
    student = tempered_log_probs(student_logits, student_temperature)
    buckets = None
    if isinstance(teacher, TeacherDistributions) and teacher.ids is not None:
        buckets = Buckets.of(student, teacher.ids)
        is_target = buckets.holds(targets)
    else:
        is_target = targets[..., None] == jax.lax.broadcasted_iota(
            targets.dtype, student.shape, student.ndim - 1
        )
    if advantages is not None:
        advantages = jax.lax.stop_gradient(advantages)[..., None].astype(student.dtype)
    entries = VocabularyEntries(
        student if buckets is None else buckets.log_probs,
        _teacher_log_probs(teacher, teacher_temperature),
        is_target,
        advantages,
    )
    term, slope = term_and_slope(divergence, entries)
    total = jnp.sum(slope, axis=-1, keepdims=True)
    if buckets is not None:
        slope = buckets.spread(slope)
    gradient = slope - jnp.exp(student) * total
    return jnp.sum(term, axis=-1), gradient / student_temperature


def _teacher_log_probs(teacher: TokenTeacher | None, temperature: float) -> Array | None:
    """Returns log p of every entry. The tail of a sparse teacher is the last entry."""
    if teacher is None:
        return None
    if not isinstance(teacher, TeacherDistributions):
        return tempered_log_probs(teacher, temperature)
    log_probs = teacher.log_probs
    if teacher.ids is not None:
        assert teacher.tail is not None, "entries that are not all have a tail"
        log_probs = jnp.concatenate([log_probs, teacher.tail[..., None]], axis=-1)
    # The teacher temperature was applied before the log-probabilities were stored, so it is 1 here.
    # They are normalised again because they may have been stored with few digits.
    return tempered_log_probs(log_probs, 1.0)


def term_and_slope(divergence: Divergence, entries: VocabularyEntries) -> tuple[Array, Array]:
    """Returns term and slope of each entry; 0 for entries that both distributions exclude."""
    student, teacher = entries.student_log_probs, entries.teacher_log_probs
    if teacher is None:
        return divergence.term(entries), divergence.slope(entries)
    # The log-ratio of two excluded entries, -inf minus -inf, would be NaN. EXCLUDED_LOG_PROB is
    # finite and has probability 0 like -inf, so terms that sum over their row stay correct.
    excluded = jnp.isneginf(student) & jnp.isneginf(teacher)
    entries = dataclasses.replace(
        entries,
        student_log_probs=jnp.where(excluded, EXCLUDED_LOG_PROB, student),
        teacher_log_probs=jnp.where(excluded, EXCLUDED_LOG_PROB, teacher),
    )
    term = jnp.where(excluded, 0.0, divergence.term(entries))
    slope = jnp.where(excluded, 0.0, divergence.slope(entries))
    return term, slope


# Arguments without gradient: the teacher, the output tokens and their advantages.
_Constants: TypeAlias = tuple[Any, Array, Array | None]


# Only the gradient, [*n, V], is kept for the backward pass, so that the logits of both models can
# be freed after the forward pass. If nothing is differentiated, XLA removes the unused gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_divergence(
    divergence: Divergence,
    temperatures: tuple[float, float],
    student_logits: Array,
    constants: _Constants,
) -> Array:
    return _forward(divergence, temperatures, student_logits, constants)[0]


def _forward(
    divergence: Divergence,
    temperatures: tuple[float, float],
    student_logits: Array,
    constants: _Constants,
) -> tuple[Array, Array]:
    teacher, targets, advantages = constants
    value, gradient = divergence_and_gradient(
        divergence,
        student_logits,
        teacher,
        targets,
        student_temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        advantages=advantages,
    )
    return value, gradient.astype(student_logits.dtype)


def _backward(
    divergence: Divergence, temperatures: tuple[float, float], gradient: Array, cotangent: Array
) -> tuple[Array, None]:
    del divergence, temperatures
    cotangent = cotangent[..., None]
    # A token with cotangent 0 gets gradient 0; 0 times an infinite gradient would be NaN.
    student_gradient = jnp.where(cotangent == 0, 0.0, cotangent * gradient)
    return student_gradient.astype(gradient.dtype), None


_token_divergence.defvjp(_forward, _backward)


def tempered_log_probs(logits: Array, temperature: float) -> Array:
    """Returns log softmax(logits / temperature), in float32 or wider.

    The maximum is subtracted before the division, so that no digits are lost with large logits and
    low temperatures.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    shifted = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))


def _check(
    divergence: Divergence,
    student_logits: Array,
    teacher: TokenTeacher | None,
    targets: Array,
) -> None:
    name = type(divergence).__name__
    if divergence.needs_teacher and teacher is None:
        raise ValueError(
            f"{name} compares the student with a teacher; got no teacher logits. Give a "
            "teacher, or use NegativeLogLikelihood."
        )
    if not divergence.needs_teacher and teacher is not None:
        raise ValueError(
            f"{name} reads no teacher; got teacher logits, whose signal would be lost. Leave the "
            "teacher out, or use ForwardKL, ReverseKL or GeneralizedJSD."
        )
    if teacher is not None:
        _check_teacher_shape(student_logits, teacher)
    if targets.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of the logits without the vocabulary; got "
            f"{targets.shape} and {student_logits.shape}. Give the targets that the logits predict."
        )


def check_advantages(divergence: Divergence, advantages: Array | None, targets: Array) -> None:
    """Checks that advantages are given if and only if the divergence needs them.

    Raises:
      ValueError: the advantages are missing or not needed, or differ in shape from the targets.
    """
    name = type(divergence).__name__
    if divergence.needs_advantages and advantages is None:
        raise ValueError(
            f"{name} weighs output tokens by their advantages; got none. Set Batch.advantages, or "
            "use another divergence."
        )
    if advantages is not None and not divergence.needs_advantages:
        raise ValueError(
            f"{name} reads no advantages; got some, whose signal would be lost. Leave "
            "Batch.advantages at None, or see objectives.with_policy_gradient."
        )
    if advantages is not None and advantages.shape != targets.shape:
        raise ValueError(
            f"advantages must have the shape of the targets; got {advantages.shape} and "
            f"{targets.shape}. Give one for each output token."
        )


def _check_teacher_shape(student_logits: Array, teacher: TokenTeacher) -> None:
    shape = student_logits.shape
    name = "teacher"
    if isinstance(teacher, TeacherDistributions):
        teacher_shape, name = teacher.log_probs.shape, "stored teacher"
        if teacher.ids is not None:  # A sparse teacher may store any number of entries.
            shape = (*shape[:-1], teacher.ids.shape[-1])
    else:
        teacher_shape = teacher.shape
    if teacher_shape[-1] != shape[-1]:
        raise ValueError(
            "teacher and student must have output layers of one vocabulary size; got "
            f"{teacher_shape[-1]} ({name}) and {shape[-1]} (student). Set "
            "vocab_size of both models alike, or restrict the larger by "
            "`models.wrapper.restrict_vocabulary` to the entries that both have, on one vocabulary."
        )
    if teacher_shape != shape:
        raise ValueError(
            "teacher and student logits must have one shape; got "
            f"{teacher_shape} ({name}) and {shape} (student). Give both "
            "models the same batch."
        )
