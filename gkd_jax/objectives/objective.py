"""The distillation objective: a divergence per token, its temperatures and its reduction."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float, Int, Params
from gkd_jax.common.batch import TeacherDistributions
from gkd_jax.objectives.divergences import Divergence
from gkd_jax.objectives.per_token import (
    TokenTeacher,
    divergence_and_gradient,
    token_divergence,
)

Reduction: TypeAlias = Literal["per_sequence", "per_token"]
"""'per_sequence' is the mean over a sequence's tokens, then over sequences (the paper's);
'per_token' is the mean over all tokens of the batch."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's predictions of a batch's targets, before they are logits.

    Attributes:
      hidden: position t predicts `targets[:, t]`.
      head: the parameters of the output layer.
      unembed: `(head, hidden)` to float32 logits.
    """

    hidden: Float[Array, "B T D"]
    head: Params
    unembed: Callable[[Params, Array], Array]

    def logits(self, counts: Bool[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of all positions; those that do not count are of hidden states of 0.

        Whatever is there, NaN included, would reach the output layer's gradient as 0 * NaN.
        """
        hidden = jnp.where(counts[..., None], self.hidden, jnp.zeros((), self.hidden.dtype))
        return self.unembed(self.head, hidden)

    def without_gradient(self) -> "Predictions":
        """The same, of a model that is not trained."""
        hidden, head = jax.lax.stop_gradient((self.hidden, self.head))
        return dataclasses.replace(self, hidden=hidden, head=head)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the student minimises on a batch of outputs, wherever they came from.

    The temperature at which outputs are sampled is no part of it: that is the rollout's.

    Attributes:
      divergence: what is measured between teacher and student at each token.
      student_temperature: of the student's softmax inside the divergence; above 0.
      teacher_temperature: of the teacher's softmax inside the divergence; above 0 (the paper
        uses 0.1 for GSM8K, 1 for WMT).
      reduction: 'per_sequence' or 'per_token'.
      z_loss: factor of log^2 Z, Z the normaliser of the student's logits without temperature;
        0 leaves it out (T5's pretraining uses 1e-4).

    Raises:
      ValueError: a setting is outside its range, or would have no effect.
    """

    divergence: Divergence
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    reduction: Reduction = "per_sequence"
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.divergence, Divergence):
            raise ValueError(
                f"Objective.divergence must be a Divergence; got {self.divergence!r}. Use an "
                "instance such as GeneralizedJSD(beta=0.5); in gin, @ForwardKL() with brackets."
            )
        for name in ("student_temperature", "teacher_temperature"):
            _check_temperature(name, getattr(self, name))
        if not self.divergence.needs_teacher and self.teacher_temperature != 1.0:
            raise ValueError(
                "Objective.teacher_temperature must be 1.0 with "
                f"{type(self.divergence).__name__}, which reads no teacher; got "
                f"{self.teacher_temperature}. Remove the setting or choose another divergence."
            )
        _check_reduction(self.reduction)
        if not (isinstance(self.z_loss, (int, float)) and 0.0 <= self.z_loss < math.inf):
            raise ValueError(
                f"Objective.z_loss must be 0 or a positive number; got {self.z_loss!r}. Set "
                "Objective.z_loss to 0.0 for none."
            )

    def of_logits(
        self,
        logits: Float[Array, "*n V"],
        teacher: TokenTeacher | None,
        targets: Int[Array, "*n"],
        advantages: Float[Array, "*n"] | None,
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n V"]]:
        """The divergence of each token, and its gradient in the student's logits."""
        return divergence_and_gradient(
            self.divergence,
            logits,
            teacher,
            targets,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            advantages=advantages,
        )


def final_weights(
    loss_weights: Float[Array, "B T"],
    *,
    reduction: Reduction,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Turns the weights of a whole batch into factors whose weighted sum is the reduced loss.

    Make them from the outputs that are trained on, after a rollout and before the batch is
    split: then the sums over any microbatches add up to the same loss and gradient.

    Args:
      loss_weights: 0 where a token does not count, not negative; of the whole global batch.
      reduction: 'per_sequence' divides each sequence by its own sum and by the number of
        sequences that have any weight; 'per_token' divides by the sum of all.
      segments: `Batch.targets_segments` where rows are packed: sequences are then the examples in
        them, so that the loss is that of the same examples in rows of their own.

    Returns:
      float32 weights that sum to 1; all 0 where no token of the batch counts.

    Raises:
      ValueError: the reduction is unknown.
    """
    _check_reduction(reduction)
    # bfloat16 cannot count above 256.
    weights = loss_weights.astype(jnp.float32)
    if reduction == "per_token":
        return _divide_or_zero(weights, jnp.sum(weights, keepdims=True))
    lengths = jnp.sum(weights, axis=1, keepdims=True)
    num_sequences = jnp.sum((lengths > 0).astype(jnp.float32), keepdims=True)
    if segments is not None:
        of_outputs, numbers = _sums_of_outputs(weights, segments)
        lengths = jnp.take_along_axis(of_outputs, numbers, axis=1)
        num_sequences = jnp.sum((of_outputs > 0).astype(jnp.float32), keepdims=True)
    return _divide_or_zero(_divide_or_zero(weights, lengths), num_sequences)


def count_outputs(
    loss_weights: Float[Array, "B T"], segments: Int[Array, "B T"] | None
) -> Float[Array, ""]:
    """Outputs of which any token counts: rows, or the examples in packed rows."""
    counts = loss_weights > 0
    if segments is None:
        return jnp.sum(jnp.any(counts, axis=1).astype(jnp.float32))
    of_outputs, _ = _sums_of_outputs(counts.astype(jnp.float32), segments)
    return jnp.sum((of_outputs > 0).astype(jnp.float32))


def _sums_of_outputs(
    values: Float[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Sums of each output of packed rows, in their order, and which of them a position is of.

    The padding at a row's end is one more.
    """
    changes = (segments[:, 1:] != segments[:, :-1]).astype(jnp.int32)
    numbers = jnp.pad(jnp.cumsum(changes, axis=1), ((0, 0), (1, 0)))

    def of_row(values: Array, numbers: Array) -> Array:
        return jax.ops.segment_sum(values, numbers, num_segments=len(values))

    return jax.vmap(of_row)(values, numbers), numbers


def weighted_loss(
    objective: Objective,
    *,
    student: Predictions,
    teacher: Predictions | TeacherDistributions | None,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Sums weights * (divergence + z_loss * log^2 Z) over all positions.

    The plain form: it makes the logits of all positions, [B, T, V], once each. Gradients go to
    the student's hidden states and head; none to the teacher, the weights or the advantages.
    Positions of weight 0 are left out: whatever is there, NaN included, reaches neither the loss
    nor a gradient. `fused.fused_weighted_loss` computes the same without those arrays.

    Args:
      objective: the divergence and its settings; its reduction is already in `weights`.
      student: hidden states and head of the student.
      teacher: likewise, or distributions from a store, to which the objective's teacher
        temperature has been applied; None where the divergence needs no teacher.
      targets: the output tokens.
      weights: from `final_weights`, perhaps multiplied by further factors.
      advantages: of the output tokens, where the divergence needs them.

    Returns:
      The loss (float32 scalar), and the divergence per token (float32, no gradient, without
      the z-loss; 0 at positions of weight 0).

    Raises:
      ValueError: the teacher or the advantages are missing or not needed, or shapes differ.
    """
    check_predictions(objective.divergence, student, teacher, weights)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    counts = weights != 0
    student_logits = student.logits(counts)
    of_teacher: TokenTeacher | None
    if isinstance(teacher, Predictions):
        of_teacher = teacher.without_gradient().logits(counts)
    else:
        of_teacher = teacher
    per_token = token_divergence(
        objective.divergence,
        student_logits,
        of_teacher,
        targets,
        student_temperature=objective.student_temperature,
        teacher_temperature=objective.teacher_temperature,
        advantages=advantages,
    )
    per_token = jnp.where(counts, per_token, 0.0)
    loss = jnp.sum(weights * per_token)
    if objective.z_loss:
        log_z = jax.nn.logsumexp(student_logits.astype(jnp.float32), axis=-1)
        log_z = jnp.where(counts, log_z, 0.0)
        loss = loss + objective.z_loss * jnp.sum(weights * jnp.square(log_z))
    return loss, jax.lax.stop_gradient(per_token)


def _divide_or_zero(numerator: Array, denominator: Array) -> Array:
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)


def _check_temperature(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0.0 < value < math.inf):
        raise ValueError(
            f"Objective.{name} must be a number above 0; got {value!r}. A softmax has no "
            "temperature of 0: to decode without randomness use Greedy decoding, and leave "
            f"Objective.{name} at 1.0."
        )


def _check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction must be one of {', '.join(get_args(Reduction))}; got {reduction!r}. Set "
            "Objective.reduction to 'per_sequence' for the paper's mean over sequences."
        )


def check_predictions(
    divergence: Divergence,
    student: Predictions,
    teacher: Predictions | TeacherDistributions | None,
    weights: Array,
) -> None:
    """Checks that there is a teacher exactly where it is read, and the shapes.

    Raises:
      ValueError: as `weighted_loss`.
    """
    name = type(divergence).__name__
    if divergence.needs_teacher and teacher is None:
        raise ValueError(
            f"{name} compares the student with a teacher; got teacher=None. Give the teacher's "
            "Predictions, or use NegativeLogLikelihood."
        )
    if teacher is not None and not divergence.needs_teacher:
        raise ValueError(
            f"{name} reads no teacher; got one, whose signal would be lost. Give teacher=None, or "
            "use another divergence."
        )
    for one in (student, *(() if teacher is None else (teacher,))):
        what, array = ("hidden states", one.hidden) if isinstance(one, Predictions) else (
            "stored distributions", one.log_probs
        )  # fmt: skip
        if array.shape[:-1] != weights.shape:
            raise ValueError(
                f"weights must have the shape of the {what} without their width; got "
                f"{weights.shape} and {array.shape}. Make the weights from the same batch."
            )
