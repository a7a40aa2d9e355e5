"""From logits to a divergence per token and its gradient, for every divergence alike."""

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
"""A teacher's logits, or its distributions as a store gives them."""


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
    """Computes D(P || Q) of each token, P = softmax(teacher/tau_t), Q = softmax(student/tau_s).

    Differentiable in the student's logits; the teacher's get no gradient. No factor tau^2 is
    applied. Entries that are -inf in both are outside both distributions and contribute 0. A
    token whose cotangent is 0 has gradient 0, even where its divergence is infinite.

    Of a teacher that is known at some entries only, it is the divergence of two bucketed
    distributions: those entries, and all others as one. The student is normalised over its whole
    vocabulary all the same.

    Args:
      divergence: which one.
      student_logits: as the model gives them, without temperature.
      teacher: logits likewise; or stored distributions, in which the temperature already is; None
        exactly where the divergence needs no teacher.
      targets: the output tokens, which the negative log-likelihood and the sampled reverse KL
        read.
      student_temperature: divides the student's logits, here and nowhere else; above 0.
      teacher_temperature: divides the teacher's logits, here and nowhere else; above 0.
      advantages: of the output tokens, for a divergence that needs them; None for all others.
        They get no gradient.

    Returns:
      The divergence per token in nats, float32 (or wider, if the logits are).

    Raises:
      ValueError: the teacher or the advantages are missing or not needed, or shapes differ.
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

    With f'_v = df/d log q_v the gradient is (f'_v - q_v sum_u f'_u) / tau_s. For losses that
    make their gradients in the forward pass; others differentiate `token_divergence`.

    Returns:
      The divergence per token, and its gradient per logit, in the same dtype.
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
    """log p of every entry."""
    if teacher is None:
        return None
    if not isinstance(teacher, TeacherDistributions):
        return tempered_log_probs(teacher, temperature)
    log_probs = teacher.log_probs
    if teacher.ids is not None:
        assert teacher.tail is not None, "entries that are not all have a tail"
        log_probs = jnp.concatenate([log_probs, teacher.tail[..., None]], axis=-1)
    # The temperature is in them; few digits may have been kept, whose sum is not quite 1.
    return tempered_log_probs(log_probs, 1.0)


def term_and_slope(divergence: Divergence, entries: VocabularyEntries) -> tuple[Array, Array]:
    """Both of each entry; 0 where neither distribution has any probability."""
    student, teacher = entries.student_log_probs, entries.teacher_log_probs
    if teacher is None:
        return divergence.term(entries), divergence.slope(entries)
    # -inf minus -inf is NaN. A finite number has probability 0 as well, so that a term that reads
    # its whole row is right too.
    excluded = jnp.isneginf(student) & jnp.isneginf(teacher)
    entries = dataclasses.replace(
        entries,
        student_log_probs=jnp.where(excluded, EXCLUDED_LOG_PROB, student),
        teacher_log_probs=jnp.where(excluded, EXCLUDED_LOG_PROB, teacher),
    )
    term = jnp.where(excluded, 0.0, divergence.term(entries))
    slope = jnp.where(excluded, 0.0, divergence.slope(entries))
    return term, slope


# The teacher, the output tokens and their advantages: what gets no gradient.
_Constants: TypeAlias = tuple[Any, Array, Array | None]


# One [*n, V] array is kept for the backward pass, the gradient itself: both logits are free as
# soon as the forward pass has ended. Without differentiation XLA drops it as unused.
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
    # 0 times an infinite gradient would be NaN, and a token that does not count must not matter.
    of_student = jnp.where(cotangent == 0, 0.0, cotangent * gradient)
    return of_student.astype(gradient.dtype), None


_token_divergence.defvjp(_forward, _backward)


def tempered_log_probs(logits: Array, temperature: float) -> Array:
    """log softmax(logits / temperature) in at least float32.

    The maximum is subtracted before the division, so that large logits and low temperatures
    cost no digits.
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
    """Checks that there are advantages exactly where they are read, one for each output token.

    Raises:
      ValueError: there are none, or such that nothing reads, or their shape is another.
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
    of_teacher, whose = teacher, "teacher"
    if isinstance(teacher, TeacherDistributions):
        of_teacher, whose = teacher.log_probs, "stored teacher"
        if teacher.ids is not None:  # Any number of entries.
            shape = (*shape[:-1], teacher.ids.shape[-1])
    assert not isinstance(of_teacher, TeacherDistributions)
    if of_teacher.shape[-1] != shape[-1]:
        raise ValueError(
            "teacher and student must have output layers of one vocabulary size; got "
            f"{of_teacher.shape[-1]} ({whose}) and {shape[-1]} (student). Set "
            "vocab_size of both models alike, or restrict the larger by "
            "`models.wrapper.restrict_vocabulary` to the entries that both have, on one vocabulary."
        )
    if of_teacher.shape != shape:
        raise ValueError(
            "teacher and student logits must have one shape; got "
            f"{of_teacher.shape} ({whose}) and {shape} (student). Give both "
            "models the same batch."
        )
