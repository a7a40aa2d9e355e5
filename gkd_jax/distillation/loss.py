"""The loss of one batch: hidden states of student and teacher, divergence, weighted sum.

Pure functions of parameters and a `Batch`. They do not depend on where the batch's targets came
from, so supervised distillation, on-policy distillation and plain fine-tuning share them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Float, Key, Metrics, Params
from gkd_jax.common.batch import Batch, TeacherDistributions
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.divergences import NegativeLogLikelihood
from gkd_jax.objectives.fused import fused_weighted_loss
from gkd_jax.objectives.objective import Objective, Predictions, count_outputs, final_weights
from gkd_jax.objectives.sequence_kl import importance_weights, returns_to_go
from gkd_jax.objectives.spans import SpanObjective, span_loss


def make_loss_fn(
    student: LanguageModel, teacher: LanguageModel | None, objective: Objective
) -> Callable[..., tuple[Float[Array, ""], Float[Array, "B T"]]]:
    """Builds the loss of one batch, as a function of the parameters of both models.

    Args:
      student: model that is trained.
      teacher: model whose distributions the student is compared with. None if the objective needs
        no teacher, or if batches contain precomputed distributions.
      objective: divergence, temperatures and reduction.

    Returns:
      A function `(student_params, teaching_params, batch, weights, dropout_key)` that returns the
      sum of `weights` times the per-token values, and the per-token values. `teaching_params` are
      an argument so that they are not compiled into the program as constants; they get no gradient.
      The teacher runs without dropout.

    Raises:
      ValueError: raised by the returned function if the objective needs a teacher, but there is
        neither a teacher nor a batch with stored distributions.
    """

    def loss_fn(
        student_params: Params,
        teaching_params: Params | None,
        batch: Batch,
        weights: Float[Array, "B T"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
        hidden = student.hidden_states(student_params, batch, dropout_key=dropout_key)
        student_predictions = Predictions(hidden, student.head(student_params), student.unembed)
        teacher_predictions: Predictions | TeacherDistributions | None = None
        if objective.divergence.needs_teacher and teacher is not None:
            teaching_params = jax.lax.stop_gradient(teaching_params)
            hidden = teacher.hidden_states(teaching_params, batch.as_teacher_reads())
            teacher_predictions = Predictions(
                hidden, teacher.head(teaching_params), teacher.unembed
            )
        elif objective.divergence.needs_teacher:
            teacher_predictions = _stored_distributions(batch, objective)
        return _weighted_loss(objective, student_predictions, teacher_predictions, batch, weights)

    return loss_fn


def _stored_distributions(batch: Batch, objective: Objective) -> TeacherDistributions:
    if batch.stored_teacher is None:
        raise ValueError(
            f"{type(objective.divergence).__name__} compares the student with a teacher; "
            "got no teacher, and a batch without a stored one. Set Experiment.teacher, or "
            "train with NegativeLogLikelihood."
        )
    return batch.stored_teacher


def _weighted_loss(
    objective: Objective,
    student: Predictions,
    teacher: Predictions | TeacherDistributions | None,
    batch: Batch,
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Returns the weighted sum of the divergence, and the divergence per token."""
    if isinstance(objective, SpanObjective):
        assert isinstance(teacher, Predictions)
        assert batch.teacher_tokens is not None, "a Retokenizer adds it"
        return span_loss(
            objective,
            student=student,
            teacher=teacher,
            targets=batch.targets,
            tokens=batch.teacher_tokens,
            weights=weights,
        )
    return fused_weighted_loss(
        objective,
        student=student,
        teacher=teacher,
        targets=batch.targets,
        weights=weights,
        advantages=batch.advantages,
    )


def make_returns_fn(
    student: LanguageModel,
    teacher: LanguageModel,
    *,
    length_normalized: bool,
    teacher_share: float = 0.0,
) -> Callable[[Params, Params, Batch], tuple[Array, Array | None, Metrics]]:
    """Builds the function that computes MiniLLM's advantages of a batch of sampled outputs.

    Both models score the outputs without dropout. Logits are computed in chunks, so no array over
    all positions and the whole vocabulary is materialized.

    Args:
      student: model being trained.
      teacher: model whose log-probabilities define the reward.
      length_normalized: passed to `returns_to_go`.
      teacher_share: weight of the teacher in the mixture that the outputs were sampled from; 0 if
        they were sampled from the student alone.

    Returns:
      A function `(student_params, teaching_params, batch)` that returns the advantage per token,
      the importance weight per token (None if `teacher_share` is 0), and the metrics 'return' (sum
      of log p - log q over an output) and, if `teacher_share` is not 0, 'importance'.
    """
    student_loss_fn = make_loss_fn(student, None, Objective(NegativeLogLikelihood()))
    teacher_loss_fn = make_loss_fn(teacher, None, Objective(NegativeLogLikelihood()))

    def returns(
        student_params: Params, teaching_params: Params, batch: Batch
    ) -> tuple[Array, Array | None, Metrics]:
        weights = batch.loss_weights
        log_q = -student_loss_fn(student_params, None, batch, weights)[1]
        log_p = -teacher_loss_fn(teaching_params, None, batch.as_teacher_reads(), weights)[1]
        advantages = returns_to_go(log_p - log_q, weights, length_normalized=length_normalized)
        num_outputs = jnp.sum(jnp.any(weights > 0, axis=1).astype(jnp.float32))
        metrics: Metrics = {"return": (jnp.sum(log_p - log_q), num_outputs)}
        if teacher_share == 0.0:
            return advantages, None, metrics
        importance = importance_weights(log_q, log_p, weights, teacher_share=teacher_share)
        metrics["importance"] = (jnp.sum(importance * weights), jnp.sum(weights))
        return advantages, importance, metrics

    return returns


def batch_weights(batch: Batch, objective: Objective) -> Float[Array, "B T"]:
    """Returns the final weight of each token. The sum is 1, or 0 if no token has weight."""
    return final_weights(
        batch.measured_weights, reduction=objective.reduction, segments=batch.targets_segments
    )


def loss_metrics(
    per_token: Float[Array, "B T"], batch: Batch, weights: Float[Array, "B T"]
) -> Metrics:
    """Computes the metrics of a step as pairs (sum, weight).

    Such pairs can be added over batches of any size.

    Args:
      per_token: loss of each token.
      batch: batch that the tokens belong to.
      weights: final weights as returned by `batch_weights`, not multiplied by factors such as
        `Batch.importance`.
    """
    measured = batch.measured_weights
    metrics = {
        "loss": mean_over_sequences(per_token, batch, weights),
        "loss_per_token": (
            jnp.sum(jnp.where(measured > 0, measured * per_token, 0.0)),
            jnp.sum(measured),
        ),
        "target_tokens": (jnp.sum(batch.loss_weights), jnp.float32(1)),
    }
    return metrics | _packing_metrics(batch)


def _packing_metrics(batch: Batch) -> Metrics:
    """Computes the number of examples and the share of positions with a token, for packed rows."""
    if batch.inputs_segments is None or batch.targets_segments is None:
        return {}
    masks = [batch.inputs_segments > 0, batch.targets_segments > 0]
    num_tokens = sum(jnp.sum(mask.astype(jnp.float32)) for mask in masks)
    num_examples = count_outputs(batch.loss_weights, batch.targets_segments)
    return {
        "packed_examples": (num_examples, jnp.float32(1)),
        "packed_share": (num_tokens, jnp.float32(sum(mask.size for mask in masks))),
    }


def mean_over_sequences(
    per_token: Float[Array, "B T"], batch: Batch, weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the mean over sequences of per-token values, as a metric (sum, weight).

    The final weights of a batch sum to 1, so the weighted sum of its per-token values is a mean.
    Returns the pair (mean * number of sequences, number of sequences). The pairs of several batches
    are added, and the total sum is divided by the total weight when the metric is written.
    """
    num_sequences = count_outputs(batch.measured_weights, batch.targets_segments)
    # `where` instead of a product, which would be NaN for an infinite value at a masked position.
    mean = jnp.sum(jnp.where(weights != 0, weights * per_token, 0.0))
    return mean * num_sequences, num_sequences
