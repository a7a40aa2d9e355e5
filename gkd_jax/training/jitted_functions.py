"""Jitted functions that training, evaluation and generation share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Key, Metrics, Params, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.rollout import Rollout, mix_outputs, rollout_metrics, sample_outputs
from gkd_jax.distillation.train_step import make_eval_step
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.objective import Objective


# The functions below are cached by the values of their arguments. The runs of a study thus share
# the jitted functions and their compiled programs.
@functools.cache
def jit_rollout(
    rollout: Rollout,
    model: LanguageModel,
    partitioner: Partitioner,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Callable[[Params, Batch, Key[Array, ""]], Batch]:
    """Jits `sample_outputs` as a function of `(params, batch, key)`."""

    def roll_out(params: Params, batch: Batch, key: Key[Array, ""]) -> Batch:
        params = partitioner.gather_over_data(model, params)
        return sample_outputs(
            model, params, batch, key=key, rollout=rollout, eos_ids=eos_ids, pad_id=pad_id
        )

    return jax.jit(partitioner.annotate(roll_out), out_shardings=partitioner.batch_sharding)


def abstract_rollout(experiment: Experiment) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a batch of rollouts during training.

    Fields that no objective reads are left out (see `without_log_probs`).
    """
    data, rollout = experiment.train_data, experiment.rollout
    inputs = (data.batch_size * rollout.num_samples, data.feature_lengths["inputs"])
    targets = (inputs[0], rollout.target_length or data.feature_lengths["targets"])
    shapes: dict[str, Any] = {
        "inputs": jax.ShapeDtypeStruct(inputs, jnp.int32),
        "inputs_mask": jax.ShapeDtypeStruct(inputs, jnp.bool_),
        "targets": jax.ShapeDtypeStruct(targets, jnp.int32),
        "loss_weights": jax.ShapeDtypeStruct(targets, jnp.float32),
        "example_id": jax.ShapeDtypeStruct(inputs[:1], jnp.int32),
    }
    if experiment.teacher is not None and experiment.teacher.num_sources is not None:
        shapes["source_id"] = shapes["example_id"]
    own = None if experiment.teacher is None else experiment.teacher.own_tokens
    if data.teacher_chat is not None or own is not None:
        length = data.teacher_inputs_length if own is None else own.inputs_length
        for name in ("inputs", "inputs_mask"):
            shape = (inputs[0], length or data.teacher_inputs_length)
            shapes[f"teacher_{name}"] = jax.ShapeDtypeStruct(shape, shapes[name].dtype)
    return Batch(**shapes)


@functools.cache
def jit_mix_outputs(
    partitioner: Partitioner,
) -> Callable[[Batch, Batch, Array, Key[Array, ""]], Batch]:
    """Jits `rollout.mix_outputs` as a function of `(batch, sampled, fraction, key)`."""

    def mix(batch: Batch, sampled: Batch, fraction: Array, key: Key[Array, ""]) -> Batch:
        return mix_outputs(batch, sampled, fraction=fraction, key=key)

    return jax.jit(mix, out_shardings=partitioner.batch_sharding)


@functools.cache
def jit_rollout_metrics(eos_ids: tuple[int, ...]) -> Callable[[Batch], Metrics]:
    """Jits `rollout_metrics`."""
    return jax.jit(functools.partial(rollout_metrics, eos_ids=eos_ids))


@functools.cache
def jit_eval_step(
    student: LanguageModel,
    teacher: LanguageModel | None,
    objective: Objective,
    partitioner: Partitioner,
) -> Callable[[Params, Params | None, Batch], Metrics]:
    """Jits `train_step.make_eval_step`."""
    return jax.jit(partitioner.annotate(make_eval_step(student, teacher, objective)))


def without_log_probs(batch: Batch) -> Batch:
    """Drops `sample_log_probs`, which no objective reads.

    Without this field, batches of data and batches of samples have the same structure. A jitted
    function that is called with both is therefore compiled only once.
    """
    return dataclasses.replace(batch, sample_log_probs=None)
