"""One training step: hidden states, divergence, gradient, update. Pure, jitted by the loop.

The step cannot tell where the batch's targets came from, so supervised and on-policy
distillation, and plain fine-tuning, are this one function.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Metrics, Params
from gkd_jax.common.batch import Batch, TeacherDistributions
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.divergences import NegativeLogLikelihood
from gkd_jax.objectives.fused import fused_weighted_loss
from gkd_jax.objectives.objective import Objective, Predictions, count_outputs, final_weights
from gkd_jax.objectives.policy_gradient import divergence_alone
from gkd_jax.objectives.sequence_kl import importance_weights, returns_to_go
from gkd_jax.objectives.spans import SpanObjective, span_loss

StepFn = Callable[..., tuple["TrainState", Metrics]]


@flax.struct.dataclass
class TrainState:
    """All arrays that training changes; what a checkpoint holds.

    Attributes:
      step: number of updates made; a step that was skipped made none.
      params: those of the student's parameters that are trained, float32.
      opt_state: the optimizer's state.
      average: the average of those parameters, where it teaches; None where no average
        is kept, and then no part of the tree.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    average: Params | None = None


def init_train_state(
    params: Params, optimizer: optax.GradientTransformation, *, with_average: bool = False
) -> TrainState:
    """Makes the state before the first step; an average starts as the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # Arrays of its own: a state whose leaves share them could not be donated.
        average=jax.tree.map(jnp.copy, params) if with_average else None,
    )


def teacher_params_of(
    state: TrainState,
    restored: Params | None,
    state_part: str | None,
    frozen: Params | None = None,
) -> Params | None:
    """The parameters that teach at this state: those restored, or a part of the state.

    Args:
      state: the state before the update.
      restored: parameters of a teacher that the state does not hold.
      state_part: 'params' or 'average'; None for the restored ones.
      frozen: the student's frozen parameters, which that part is joined to.
    """
    return restored if state_part is None else lora.join(getattr(state, state_part), frozen)


def follow(average: Params, params: Params, *, decay: float) -> Params:
    """Moves an average towards new parameters: decay * average + (1 - decay) * params."""
    # In this form an average of equal numbers stays what it is.
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)


def make_loss_fn(
    student: LanguageModel, teacher: LanguageModel | None, objective: Objective
) -> Callable[..., tuple[Float[Array, ""], Float[Array, "B T"]]]:
    """Makes the loss of one batch, as a function of both models' parameters.

    Args:
      student: the model that is trained.
      teacher: the model that scores; None for an objective that needs none, and where batches
        hold a stored teacher.
      objective: divergence, temperatures and reduction.

    Returns:
      A function `(student_params, teacher_params, batch, weights, dropout_key)` to the sum of
      `weights` times per-token values, and the per-token values. Teacher parameters are an
      argument, never closed over, and get no gradient. The teacher never drops out.

    Raises:
      ValueError: from that function, if the objective needs a teacher and there is none.
    """
    needs_teacher = objective.divergence.needs_teacher

    def loss_fn(
        student_params: Params,
        teacher_params: Params | None,
        batch: Batch,
        weights: Float[Array, "B T"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
        hidden = student.hidden_states(student_params, batch, dropout_key=dropout_key)
        of_student = Predictions(hidden, student.head(student_params), student.unembed)
        of_teacher: Predictions | TeacherDistributions | None = None
        if needs_teacher and teacher is not None:
            teacher_params = jax.lax.stop_gradient(teacher_params)
            hidden = teacher.hidden_states(teacher_params, batch.as_teacher_reads())
            of_teacher = Predictions(hidden, teacher.head(teacher_params), teacher.unembed)
        elif needs_teacher:
            of_teacher = batch.stored_teacher
            if of_teacher is None:
                raise ValueError(
                    f"{type(objective.divergence).__name__} compares the student with a teacher; "
                    "got no teacher, and a batch without a stored one. Set Experiment.teacher, or "
                    "train with NegativeLogLikelihood."
                )
        if isinstance(objective, SpanObjective):
            assert isinstance(of_teacher, Predictions)
            assert batch.teacher_tokens is not None, "a TeacherReader gives it"
            return span_loss(
                objective,
                student=of_student,
                teacher=of_teacher,
                targets=batch.targets,
                tokens=batch.teacher_tokens,
                weights=weights,
            )
        return fused_weighted_loss(
            objective,
            student=of_student,
            teacher=of_teacher,
            targets=batch.targets,
            weights=weights,
            advantages=batch.advantages,
        )

    return loss_fn


def make_returns_fn(
    student: LanguageModel,
    teacher: LanguageModel,
    *,
    length_normalized: bool,
    teacher_share: float = 0.0,
) -> Callable[[Params, Params, Batch], tuple[Array, Array | None, Metrics]]:
    """Makes `(student_params, teacher_params, batch)` to what MiniLLM adds to a batch of samples.

    Both models score the outputs, without dropout and without an array of all positions and the
    whole vocabulary.

    Args:
      student: who learns.
      teacher: who judges.
      length_normalized: as `returns_to_go` has it.
      teacher_share: of the mixture that wrote the outputs; 0 where the student wrote them alone.

    Returns:
      A function to advantages and importance per token, the latter None for a share of 0; and the
      metrics 'return' (sum of log p - log q of an output) and, with a share, 'importance'.
    """
    likelihood = make_loss_fn(student, None, Objective(NegativeLogLikelihood()))
    of_teacher = make_loss_fn(teacher, None, Objective(NegativeLogLikelihood()))

    def returns(
        student_params: Params, teacher_params: Params, batch: Batch
    ) -> tuple[Array, Array | None, Metrics]:
        weights = batch.loss_weights
        log_q = -likelihood(student_params, None, batch, weights)[1]
        log_p = -of_teacher(teacher_params, None, batch.as_teacher_reads(), weights)[1]
        advantages = returns_to_go(log_p - log_q, weights, length_normalized=length_normalized)
        num_outputs = jnp.sum(jnp.any(weights > 0, axis=1).astype(jnp.float32))
        metrics: Metrics = {"return": (jnp.sum(log_p - log_q), num_outputs)}
        if teacher_share == 0.0:
            return advantages, None, metrics
        importance = importance_weights(log_q, log_p, weights, teacher_share=teacher_share)
        metrics["importance"] = (jnp.sum(importance * weights), jnp.sum(weights))
        return advantages, importance, metrics

    return returns


def _final_weights(batch: Batch, objective: Objective) -> Float[Array, "B T"]:
    return final_weights(
        batch.measured_weights, reduction=objective.reduction, segments=batch.targets_segments
    )


def loss_metrics(
    per_token: Float[Array, "B T"], batch: Batch, weights: Float[Array, "B T"]
) -> Metrics:
    """Sums and weights of what a step reports, comparable over batches of any size.

    `weights` are final weights, so their sum over everything is 1 (0 for an empty batch), before
    factors such as `Batch.importance`.
    """
    measured = batch.measured_weights
    metrics = {
        "loss": _mean_over_sequences(per_token, batch, weights),
        "loss_per_token": (
            jnp.sum(jnp.where(measured > 0, measured * per_token, 0.0)),
            jnp.sum(measured),
        ),
        "target_tokens": (jnp.sum(batch.loss_weights), jnp.float32(1)),
    }
    return metrics | _packing_metrics(batch)


def _packing_metrics(batch: Batch) -> Metrics:
    """Of packed rows, how many examples a batch has and what share of its places are tokens."""
    if batch.inputs_segments is None or batch.targets_segments is None:
        return {}
    places = [batch.inputs_segments > 0, batch.targets_segments > 0]
    filled = sum(jnp.sum(part.astype(jnp.float32)) for part in places)
    examples = count_outputs(batch.loss_weights, batch.targets_segments)
    return {
        "packed_examples": (examples, jnp.float32(1)),
        "packed_share": (filled, jnp.float32(sum(part.size for part in places))),
    }


def _mean_over_sequences(
    per_token: Float[Array, "B T"], batch: Batch, weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    num_sequences = count_outputs(batch.measured_weights, batch.targets_segments)
    # where, not a product: an infinite value at a masked position must not become NaN.
    mean = jnp.sum(jnp.where(weights != 0, weights * per_token, 0.0))
    return mean * num_sequences, num_sequences


def split_microbatches(tree: Any, num_microbatches: int) -> Any:
    """Reshapes every leaf [B, ...] to [num_microbatches, B / num_microbatches, ...].

    Microbatch m takes the rows m, m + M, m + 2M, ...: with the batch sharded in contiguous
    blocks over devices, each device keeps its own rows, and nothing is sent.
    """

    def split(leaf: Array) -> Array:
        rows = leaf.reshape(leaf.shape[0] // num_microbatches, num_microbatches, *leaf.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    return jax.tree.map(split, tree)


def make_gradient_fn(
    student: LanguageModel,
    teacher: LanguageModel | None,
    objective: Objective,
    *,
    num_microbatches: int,
) -> Callable[..., tuple[Params, Metrics]]:
    """Makes `(params, teacher_params, batch, weights, key, frozen)` to gradient and metrics.

    Microbatches add up, in float32: `weights` are final weights of the whole batch. `params` are
    those that are trained; `frozen`, None by default, is the rest of the student.
    """
    loss_fn = make_loss_fn(student, teacher, objective)

    def loss_of_trained(params: Params, frozen: Params | None, *arguments: Any) -> Any:
        return loss_fn(lora.join(params, frozen), *arguments)

    grad_fn = jax.value_and_grad(loss_of_trained, has_aux=True)

    def metrics_of(per_token: Array, batch: Batch, weights: Array) -> Metrics:
        metrics = loss_metrics(per_token, batch, weights)
        divergence = divergence_alone(objective.divergence, per_token)
        if divergence is not None:
            metrics["divergence"] = _mean_over_sequences(divergence, batch, weights)
        return metrics

    def gradients(
        params: Params,
        teacher_params: Params | None,
        batch: Batch,
        weights: Float[Array, "B T"],
        key: Key[Array, ""],
        frozen: Params | None = None,
    ) -> tuple[Params, Metrics]:
        def of_microbatch(index: Any, batch: Batch, weights: Array) -> Any:
            dropout_key = jax.random.fold_in(key, index)
            return grad_fn(params, frozen, teacher_params, batch, weights, dropout_key)

        if num_microbatches == 1:
            (_, per_token), grads = of_microbatch(0, batch, weights)
            return grads, metrics_of(per_token, batch, weights)

        def accumulate(carry: Params, part: Any) -> tuple[Params, Array]:
            index, batch_part, weights_part = part
            (_, per_token), grads = of_microbatch(index, batch_part, weights_part)
            return jax.tree.map(jnp.add, carry, grads), per_token

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        parts = (
            jnp.arange(num_microbatches),
            *split_microbatches((batch, weights), num_microbatches),
        )
        grads, per_token = jax.lax.scan(accumulate, zeros, parts)
        per_token = jnp.swapaxes(per_token, 0, 1).reshape(batch.targets.shape)
        return grads, metrics_of(per_token, batch, weights)

    return gradients


def make_train_step(
    student: LanguageModel,
    teacher: LanguageModel | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    teacher_part: str | None = None,
    average_decay: float | None = None,
    skips_non_finite: bool = False,
) -> StepFn:
    """Makes the training step.

    Loss and gradient do not depend on `num_microbatches`: the weight of every token is fixed
    over the whole batch first, and microbatches only add up (in float32). Dropout masks do
    depend on it.

    Args:
      student: the model that is trained.
      teacher: the model that scores; None for an objective that needs none.
      objective: divergence, temperatures and reduction.
      optimizer: makes the update.
      num_microbatches: parts of the batch whose gradients are added up.
      teacher_part: 'params' or 'average', if that part of the state teaches; None where the
        teacher's parameters are those given.
      average_decay: of the state's average, which follows each update; None where none is kept.
      skips_non_finite: whether a step whose loss or gradient is NaN or infinite changes nothing,
        and counts in no metric but its tokens.

    Returns:
      A function `(state, teacher_params, batch, key, frozen)` to the new state and metrics, of
      which 'non_finite' is 1 if loss or gradient are NaN or infinite, else 0; `key` must differ at
      every step. `frozen`, None by default, are the student's parameters that are not trained: they
      are not differentiated, and no part of the state.
    """
    gradients = make_gradient_fn(student, teacher, objective, num_microbatches=num_microbatches)

    def train_step(
        state: TrainState,
        teacher_params: Params | None,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        weights = _final_weights(batch, objective)
        if batch.importance is not None:
            weights = weights * batch.importance
        teacher_params = teacher_params_of(state, teacher_params, teacher_part, frozen)
        grads, metrics = gradients(state.params, teacher_params, batch, weights, key, frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = (optax.tree.norm(grads), jnp.float32(1))
        average = state.average
        if average_decay is not None:
            average = follow(average, params, decay=average_decay)
        new_state = TrainState(
            step=state.step + 1, params=params, opt_state=opt_state, average=average
        )
        is_finite = jnp.isfinite(metrics["grad_norm"][0]) & jnp.isfinite(metrics["loss"][0])
        if skips_non_finite:
            new_state, metrics = _unless_finite(is_finite, state, new_state, metrics)
        metrics["non_finite"] = (1.0 - is_finite.astype(jnp.float32), jnp.float32(1))
        return new_state, metrics

    return train_step


def _unless_finite(
    is_finite: Bool[Array, ""], state: TrainState, new_state: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """The new state and metrics; if not finite the old state, and metrics of no weight."""
    kept: TrainState = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old), new_state, state
    )
    counted = {
        name: pair if name == "target_tokens" else jnp.where(is_finite, jnp.stack(pair), 0.0)
        for name, pair in metrics.items()
    }
    return kept, {name: (pair[0], pair[1]) for name, pair in counted.items()}


def make_eval_step(
    student: LanguageModel, teacher: LanguageModel | None, objective: Objective
) -> Callable[[Params, Params | None, Batch], Metrics]:
    """Makes `(student_params, teacher_params, batch)` to the objective's metrics, no dropout."""
    loss_fn = make_loss_fn(student, teacher, objective)

    def eval_step(student_params: Params, teacher_params: Params | None, batch: Batch) -> Metrics:
        weights = _final_weights(batch, objective)
        _, per_token = loss_fn(student_params, teacher_params, batch, weights)
        return loss_metrics(per_token, batch, weights)

    return eval_step
