"""One training step: loss, gradient, update. Pure functions, jitted by the training loop.

The step does not depend on where the batch's targets came from, so supervised distillation,
on-policy distillation and plain fine-tuning share one function. The loss itself is in `loss`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gkd_jax.common.array_types import Array, Bool, Float, Key, Metrics, Params
from gkd_jax.common.batch import Batch
from gkd_jax.distillation import parameter_sources
from gkd_jax.distillation.loss import (
    batch_weights,
    loss_metrics,
    make_loss_fn,
    make_returns_fn,
    mean_over_sequences,
)
from gkd_jax.distillation.parameter_sources import ALL_RESTORED, Sources
from gkd_jax.distillation.train_state import TrainState, init_train_state, update_average
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.objective import Objective
from gkd_jax.objectives.policy_gradient import divergence_alone

StepFn = Callable[..., tuple[TrainState, Metrics]]


def split_microbatches(tree: Any, num_microbatches: int) -> Any:
    """Reshapes every leaf [B, ...] to [num_microbatches, B / num_microbatches, ...].

    With M microbatches, microbatch m takes the rows m, m + M, m + 2M, ... If the batch is sharded
    over devices in contiguous blocks, every device keeps its own rows and no communication is
    needed.
    """

    def split(leaf: Array) -> Array:
        rows = leaf.reshape(leaf.shape[0] // num_microbatches, num_microbatches, *leaf.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    return jax.tree.map(split, tree)


def _step_metrics(objective: Objective, per_token: Array, batch: Batch, weights: Array) -> Metrics:
    """Computes the metrics, including the divergence alone if a policy gradient is added to it."""
    metrics = loss_metrics(per_token, batch, weights)
    divergence = divergence_alone(objective.divergence, per_token)
    if divergence is not None:
        metrics["divergence"] = mean_over_sequences(divergence, batch, weights)
    return metrics


def make_gradient_fn(
    student: LanguageModel,
    teacher: LanguageModel | None,
    objective: Objective,
    *,
    num_microbatches: int,
) -> Callable[..., tuple[Params, Metrics]]:
    """Builds the function that computes the gradient and the metrics of one batch.

    Args:
      student: model that is trained.
      teacher: model whose distributions the student is compared with, or None.
      objective: divergence, temperatures and reduction.
      num_microbatches: number of parts that the batch is split into. Their gradients are summed in
        float32.

    Returns:
      A function `(params, teaching_params, batch, weights, key, frozen)` that returns the gradient
      with respect to `params`, and metrics. `params` are the student's trainable parameters.
      `frozen` are its other parameters; the default is None. `weights` are the final weights of the
      whole batch.
    """
    loss_fn = make_loss_fn(student, teacher, objective)

    def loss_of_trained(params: Params, frozen: Params | None, *arguments: Any) -> Any:
        return loss_fn(lora.join(params, frozen), *arguments)

    grad_fn = jax.value_and_grad(loss_of_trained, has_aux=True)

    def gradients(
        params: Params,
        teaching_params: Params | None,
        batch: Batch,
        weights: Float[Array, "B T"],
        key: Key[Array, ""],
        frozen: Params | None = None,
    ) -> tuple[Params, Metrics]:
        def of_microbatch(index: Any, batch: Batch, weights: Array) -> Any:
            dropout_key = jax.random.fold_in(key, index)
            return grad_fn(params, frozen, teaching_params, batch, weights, dropout_key)

        if num_microbatches == 1:
            (_, per_token), grads = of_microbatch(0, batch, weights)
        else:
            grads, per_token = _accumulate(
                of_microbatch, params, batch, weights, num_microbatches=num_microbatches
            )
        return grads, _step_metrics(objective, per_token, batch, weights)

    return gradients


def _accumulate(
    of_microbatch: Callable[..., Any],
    params: Params,
    batch: Batch,
    weights: Float[Array, "B T"],
    *,
    num_microbatches: int,
) -> tuple[Params, Float[Array, "B T"]]:
    """Returns the sum of the microbatches' gradients, and the per-token values of all rows."""

    def accumulate(carry: Params, microbatch: Any) -> tuple[Params, Array]:
        (_, per_token), grads = of_microbatch(*microbatch)
        return jax.tree.map(jnp.add, carry, grads), per_token

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    microbatches = (
        jnp.arange(num_microbatches),
        *split_microbatches((batch, weights), num_microbatches),
    )
    grads, per_token = jax.lax.scan(accumulate, zeros, microbatches)
    return grads, jnp.swapaxes(per_token, 0, 1).reshape(batch.targets.shape)


def make_train_step(
    student: LanguageModel,
    teacher: LanguageModel | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    sources: Sources = ALL_RESTORED,
    skips_non_finite: bool = False,
) -> StepFn:
    """Builds the training step.

    Loss and gradient do not depend on `num_microbatches`: the weight of every token is computed
    over the whole batch first, and the microbatches' gradients are summed in float32. Dropout masks
    do depend on `num_microbatches`.

    Args:
      student: model that is trained.
      teacher: model whose distributions the student is compared with; None if the objective needs
        no teacher, or if batches contain precomputed distributions.
      objective: divergence, temperatures and reduction.
      optimizer: computes the update from the gradient.
      num_microbatches: number of parts that the batch is split into.
      sources: sources of the teacher's parameters. By default, the teacher's parameters are the
        argument `teacher_params` of the step. If one source is an `Average`, the step also updates
        the average in the state.
      skips_non_finite: whether a step with a NaN or infinite loss or gradient leaves the state
        unchanged and counts in no metrics except 'target_tokens' and 'non_finite'.

    Returns:
      A function `(state, teacher_params, batch, key, frozen)` that returns the new state and
      metrics. `teacher_params` are the restored parameters of the teacher, in the form that
      `parameter_sources.resolve` takes. `key` must differ in every step. `frozen` are the student's
      parameters that are not trained; the default is None. They are not differentiated and not part
      of the state. The metric 'non_finite' is 1 if the loss or the gradient is NaN or infinite,
      else 0.
    """
    gradients = make_gradient_fn(student, teacher, objective, num_microbatches=num_microbatches)
    average_decay = parameter_sources.average_decay(sources)

    def train_step(
        state: TrainState,
        teacher_params: Params | None,
        batch: Batch,
        key: Key[Array, ""],
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        weights = batch_weights(batch, objective)
        if batch.importance is not None:
            weights = weights * batch.importance
        teaching_params = parameter_sources.resolve(sources, state, teacher_params, frozen)
        grads, metrics = gradients(state.params, teaching_params, batch, weights, key, frozen)
        new_state = _updated(state, grads, optimizer, average_decay)
        metrics["grad_norm"] = (optax.tree.norm(grads), jnp.float32(1))
        is_finite = jnp.isfinite(metrics["grad_norm"][0]) & jnp.isfinite(metrics["loss"][0])
        if skips_non_finite:
            new_state, metrics = _unless_finite(is_finite, state, new_state, metrics)
        metrics["non_finite"] = (1.0 - is_finite.astype(jnp.float32), jnp.float32(1))
        return new_state, metrics

    return train_step


def _updated(
    state: TrainState,
    grads: Params,
    optimizer: optax.GradientTransformation,
    average_decay: float | None,
) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average_decay is not None:
        average = update_average(average, params, decay=average_decay)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, average=average)


def _unless_finite(
    is_finite: Bool[Array, ""], state: TrainState, new_state: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """Returns the new state and the metrics if `is_finite` is True.

    Otherwise returns the old state, and metrics with weight 0 except for 'target_tokens'.
    """
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
    """Builds the evaluation step, which computes the loss without dropout.

    Returns:
      A function `(student_params, teaching_params, batch)` that returns metrics.
    """
    loss_fn = make_loss_fn(student, teacher, objective)

    def eval_step(student_params: Params, teaching_params: Params | None, batch: Batch) -> Metrics:
        weights = batch_weights(batch, objective)
        _, per_token = loss_fn(student_params, teaching_params, batch, weights)
        return loss_metrics(per_token, batch, weights)

    return eval_step


__all__ = [
    "StepFn",
    "TrainState",
    "init_train_state",
    "loss_metrics",
    "make_eval_step",
    "make_gradient_fn",
    "make_loss_fn",
    "make_returns_fn",
    "make_train_step",
    "split_microbatches",
]
