"""The distillation objective: a divergence per token, its temperatures and its reduction.

`weighted_loss` computes the loss in its plain form and serves as the reference. Training uses
`fused.fused_weighted_loss`, which computes the same values in less memory.
"""

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
"""'per_sequence' is the mean over a sequence's tokens, then over sequences, as in the GKD paper;
'per_token' is the mean over all tokens of the batch."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's predictions of a batch's targets, before the output layer is applied.

    Attributes:
      hidden: hidden states; position t predicts `targets[:, t]`.
      head: parameters of the output layer.
      unembed: function of (head, hidden states) that returns float32 logits.
    """

    hidden: Float[Array, "B T D"]
    head: Params
    unembed: Callable[[Params, Array], Array]

    def logits(self, mask: Bool[Array, "B T"]) -> Float[Array, "B T V"]:
        """Returns the logits of all positions, with hidden states outside of `mask` set to 0.

        A NaN in a hidden state outside of `mask` would otherwise reach the gradient of the output
        layer, because 0 * NaN is NaN.
        """
        hidden = jnp.where(mask[..., None], self.hidden, jnp.zeros((), self.hidden.dtype))
        return self.unembed(self.head, hidden)

    def without_gradient(self) -> "Predictions":
        """Returns the predictions of a model that is not trained."""
        hidden, head = jax.lax.stop_gradient((self.hidden, self.head))
        return dataclasses.replace(self, hidden=hidden, head=head)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss that the student minimises, whether outputs come from the data or the student.

    The temperature for sampling outputs is a setting of the rollout, not of the objective.

    Attributes:
      divergence: divergence between teacher and student at each token.
      student_temperature: temperature of the student's softmax inside the divergence; above 0.
      teacher_temperature: temperature of the teacher's softmax inside the divergence; above 0 (the
        GKD paper uses 0.1 for GSM8K, 1 for WMT).
      reduction: 'per_sequence' or 'per_token'.
      z_loss: factor of log^2 Z, with Z the normaliser of the student's logits without temperature;
        0 for no z-loss (T5's pretraining uses 1e-4).

    Raises:
      ValueError: a setting is outside its range, or would have no effect.

    Examples:
      Two sequences of two tokens; the second token of the second sequence is padding. The output
      layer is the identity here, so that hidden states are logits.

      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> objective = objectives.Objective(objectives.ForwardKL(), teacher_temperature=0.5)
      >>> mask = jnp.array([[1.0, 1.0], [1.0, 0.0]])
      >>> weights = objectives.final_weights(mask, reduction=objective.reduction)
      >>> print(weights)
      [[0.25 0.25]
       [0.5  0.  ]]
      >>> student = jnp.zeros((2, 2, 3))
      >>> teacher = jnp.array([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]] * 2])
      >>> loss, per_token = objectives.weighted_loss(
      ...     objective,
      ...     student=objectives.Predictions(student, jnp.eye(3), lambda head, x: x @ head),
      ...     teacher=objectives.Predictions(teacher, jnp.eye(3), lambda head, x: x @ head),
      ...     targets=jnp.zeros((2, 2), int),
      ...     weights=weights,
      ... )
      >>> print(f"{loss:.4f}", " ".join(f"{value:.4f}" for value in per_token.ravel()))
      0.5689 0.4330 0.0000 0.9213 0.0000
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

    def value_and_gradient(
        self,
        logits: Float[Array, "*n V"],
        teacher: TokenTeacher | None,
        targets: Int[Array, "*n"],
        advantages: Float[Array, "*n"] | None,
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n V"]]:
        """Returns the divergence of each token, and its gradient per logit of the student."""
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
    """Converts loss weights to final weights: the loss is the sum of weight * value over tokens.

    Call it on the whole batch, before the batch is split into microbatches. The weighted sums of
    the microbatches then add up to the loss and gradient of the batch. If outputs are sampled, call
    it after the rollout, with the weights of the outputs that are trained on.

    Args:
      loss_weights: weight of each token of the whole global batch, not negative; 0 at tokens that
        do not count.
      reduction: 'per_sequence' divides the weights of each sequence by their sum and by the number
        of sequences that have any weight; 'per_token' divides all weights by their total.
      segments: `Batch.targets_segments` if rows are packed. Each example in a row then counts as a
        sequence, so that the loss is the same as with one example per row.

    Returns:
      float32 weights that sum to 1; all 0 if no token of the batch has weight.

    Raises:
      ValueError: the reduction is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gkd_jax import objectives
      >>> mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
      >>> print(objectives.final_weights(mask, reduction="per_sequence"))
      [[0.125 0.125 0.125 0.125]
       [0.5   0.    0.    0.   ]]
      >>> print(objectives.final_weights(mask, reduction="per_token"))
      [[0.2 0.2 0.2 0.2]
       [0.2 0.  0.  0. ]]
    """
    _check_reduction(reduction)
    # A sum of ones in bfloat16 cannot exceed 256.
    weights = loss_weights.astype(jnp.float32)
    if reduction == "per_token":
        return _divide_or_zero(weights, jnp.sum(weights, keepdims=True))
    lengths = jnp.sum(weights, axis=1, keepdims=True)
    num_sequences = jnp.sum((lengths > 0).astype(jnp.float32), keepdims=True)
    if segments is not None:
        output_sums, indices = _sums_of_outputs(weights, segments)
        lengths = jnp.take_along_axis(output_sums, indices, axis=1)
        num_sequences = jnp.sum((output_sums > 0).astype(jnp.float32), keepdims=True)
    return _divide_or_zero(_divide_or_zero(weights, lengths), num_sequences)


def count_outputs(
    loss_weights: Float[Array, "B T"], segments: Int[Array, "B T"] | None
) -> Float[Array, ""]:
    """Counts the outputs that have any weight. In packed rows each example is an output."""
    mask = loss_weights > 0
    if segments is None:
        return jnp.sum(jnp.any(mask, axis=1).astype(jnp.float32))
    output_sums, _ = _sums_of_outputs(mask.astype(jnp.float32), segments)
    return jnp.sum((output_sums > 0).astype(jnp.float32))


def _sums_of_outputs(
    values: Float[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Sums values over each output of packed rows.

    Returns:
      The sums, in the order of the outputs in a row, and the index of the output that each position
      belongs to. The padding at the end of a row counts as one more output.
    """
    changes = (segments[:, 1:] != segments[:, :-1]).astype(jnp.int32)
    indices = jnp.pad(jnp.cumsum(changes, axis=1), ((0, 0), (1, 0)))

    def row_sums(values: Array, indices: Array) -> Array:
        return jax.ops.segment_sum(values, indices, num_segments=len(values))

    return jax.vmap(row_sums)(values, indices), indices


def weighted_loss(
    objective: Objective,
    *,
    student: Predictions,
    teacher: Predictions | TeacherDistributions | None,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Computes the loss of a batch in its plain form,

        sum of weights * (divergence + z_loss * log^2 Z) over all positions.

    The logits of both models, [B, T, V], are held in memory for all positions;
    `fused_weighted_loss` computes the same values without such arrays. The student's hidden states
    and head get gradients; the teacher, the weights and the advantages get none. Positions of
    weight 0 are left out: their values, NaN included, reach neither the loss nor a gradient.

    Args:
      objective: the divergence and its settings. `weights` already include its reduction.
      student: hidden states and output layer of the student.
      teacher: hidden states and output layer of the teacher; or its stored distributions, to which
        the objective's teacher temperature was already applied; None if the divergence needs no
        teacher.
      targets: output tokens.
      weights: result of `final_weights`, optionally multiplied by further factors.
      advantages: advantages of the output tokens, if the divergence needs them.

    Returns:
      The loss (float32 scalar), and the divergence per token (float32, no gradient, without
      the z-loss; 0 at positions of weight 0).

    Raises:
      ValueError: the teacher or the advantages are missing or not needed, or shapes differ.
    """
    check_predictions(objective.divergence, student, teacher, weights)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    mask = weights != 0
    student_logits = student.logits(mask)
    token_teacher: TokenTeacher | None
    if isinstance(teacher, Predictions):
        token_teacher = teacher.without_gradient().logits(mask)
    else:
        token_teacher = teacher
    per_token = token_divergence(
        objective.divergence,
        student_logits,
        token_teacher,
        targets,
        student_temperature=objective.student_temperature,
        teacher_temperature=objective.teacher_temperature,
        advantages=advantages,
    )
    per_token = jnp.where(mask, per_token, 0.0)
    loss = jnp.sum(weights * per_token)
    if objective.z_loss:
        log_z = jax.nn.logsumexp(student_logits.astype(jnp.float32), axis=-1)
        log_z = jnp.where(mask, log_z, 0.0)
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
    """Checks all shapes, and that a teacher is given if and only if the divergence needs one.

    Raises:
      ValueError: the teacher is missing or not needed, or shapes differ.
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
