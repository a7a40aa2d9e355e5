"""The distillation objective: a divergence per token, its temperatures and its reduction."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias, get_args

import jax
import jax.numpy as jnp

from gkd_jax.array_types import Array, Bool, Float, Int
from gkd_jax.objectives.divergences import Divergence
from gkd_jax.objectives.token_divergence import token_divergence

Reduction: TypeAlias = Literal["per_sequence", "per_token"]
"""'per_sequence' is the mean over a sequence's tokens, then over sequences (the paper's);
'per_token' is the mean over all tokens of the batch."""

Unembed: TypeAlias = Callable[[Array], Array]
"""Hidden states to float32 logits."""


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


class WeightedLoss(Protocol):
    """The signature of `weighted_loss`, which other ways of computing the same loss share."""

    def __call__(
        self,
        objective: Objective,
        *,
        student_hidden: Float[Array, "B T D"],
        student_unembed: Unembed,
        teacher_hidden: Float[Array, "B T E"] | None,
        teacher_unembed: Unembed | None,
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
    ) -> tuple[Float[Array, ""], Float[Array, "B T"]]: ...


def final_weights(
    loss_weights: Float[Array, "B T"], *, reduction: Reduction
) -> Float[Array, "B T"]:
    """Turns the weights of a whole batch into factors whose weighted sum is the reduced loss.

    Make them from the outputs that are trained on, after a rollout and before the batch is
    split: then the sums over any microbatches add up to the same loss and gradient.

    Args:
      loss_weights: 0 where a token does not count, not negative; of the whole global batch.
      reduction: 'per_sequence' divides each sequence by its own sum and by the number of
        sequences that have any weight; 'per_token' divides by the sum of all.

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
    return _divide_or_zero(_divide_or_zero(weights, lengths), num_sequences)


def weighted_loss(
    objective: Objective,
    *,
    student_hidden: Float[Array, "B T D"],
    student_unembed: Unembed,
    teacher_hidden: Float[Array, "B T E"] | None,
    teacher_unembed: Unembed | None,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Sums weights * (divergence + z_loss * log^2 Z) over all positions.

    The plain form: it makes the logits of all positions, [B, T, V], once each. Gradients go to
    the student's hidden states and to whatever its `unembed` closes over; none to the teacher
    or to the weights. Positions of weight 0 are left out: whatever is there, NaN included,
    reaches neither the loss nor a gradient.

    Args:
      objective: the divergence and its settings; its reduction is already in `weights`.
      student_hidden: position t predicts `targets[:, t]`.
      student_unembed: student's hidden states to float32 logits.
      teacher_hidden: likewise; None where the divergence needs no teacher.
      teacher_unembed: teacher's hidden states to float32 logits; None likewise.
      targets: the output tokens.
      weights: from `final_weights`, perhaps multiplied by further factors.

    Returns:
      The loss (float32 scalar), and the divergence per token (float32, no gradient, without
      the z-loss; 0 at positions of weight 0).

    Raises:
      ValueError: the teacher is missing or not needed, or shapes differ.
    """
    _check_teacher(objective.divergence, teacher_hidden, teacher_unembed)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    counts = weights != 0
    student_logits = student_unembed(_zero_unless(counts, student_hidden))
    teacher_logits = None
    if teacher_hidden is not None and teacher_unembed is not None:
        teacher_hidden = jax.lax.stop_gradient(_zero_unless(counts, teacher_hidden))
        teacher_logits = jax.lax.stop_gradient(teacher_unembed(teacher_hidden))
    per_token = token_divergence(
        objective.divergence,
        student_logits,
        teacher_logits,
        targets,
        student_temperature=objective.student_temperature,
        teacher_temperature=objective.teacher_temperature,
    )
    per_token = jnp.where(counts, per_token, 0.0)
    loss = jnp.sum(weights * per_token)
    if objective.z_loss:
        log_z = jax.nn.logsumexp(student_logits.astype(jnp.float32), axis=-1)
        log_z = jnp.where(counts, log_z, 0.0)
        loss = loss + objective.z_loss * jnp.sum(weights * jnp.square(log_z))
    return loss, jax.lax.stop_gradient(per_token)


def _zero_unless(counts: Bool[Array, "B T"], hidden: Float[Array, "B T D"]) -> Array:
    """Blanks positions that do not count: 0 * NaN in the output layer's gradient is NaN."""
    if hidden.shape[:-1] != counts.shape:
        raise ValueError(
            "weights must have the shape of the hidden states without their width; got "
            f"{counts.shape} and {hidden.shape}. Make the weights from the same batch."
        )
    return jnp.where(counts[..., None], hidden, jnp.zeros((), hidden.dtype))


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


def _check_teacher(
    divergence: Divergence, teacher_hidden: Array | None, teacher_unembed: Unembed | None
) -> None:
    given = teacher_hidden is not None, teacher_unembed is not None
    if given != (divergence.needs_teacher, divergence.needs_teacher):
        wanted = "needs both" if divergence.needs_teacher else "reads neither"
        raise ValueError(
            f"{type(divergence).__name__} {wanted} of teacher_hidden and teacher_unembed; got "
            f"{' and '.join('some' if is_given else 'None' for is_given in given)}. Give a teacher "
            "exactly where divergence.needs_teacher is True."
        )
