"""What the run modes share: restored parameters, jitted functions, random keys."""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from gkd_jax.array_types import Array, Key, Metrics, Params
from gkd_jax.batch import Batch
from gkd_jax.checkpoints import load
from gkd_jax.checkpoints.store import CheckpointStore
from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.experiment import Experiment
from gkd_jax.models.base import LanguageModel
from gkd_jax.partitioning import Partitioner
from gkd_jax.rollout import Rollout, sample_outputs


class Purpose(enum.IntEnum):
    """What a random key is for. Numbers are part of a run's identity: never reuse one."""

    INIT = 0
    DROPOUT = 1
    ROLLOUT = 2
    EVALUATION = 3
    GENERATION = 4


def make_key(seed: int, purpose: Purpose, step: int = 0) -> Key[Array, ""]:
    """Derives the key of one purpose at one step from the run's seed."""
    key = jax.random.fold_in(jax.random.key(seed), int(purpose))
    return jax.random.fold_in(key, step)


def sharded_abstract_params(
    experiment: Experiment, model: LanguageModel, *, dtype: Any = None
) -> Params:
    """Shapes of a model's parameters with their shardings, in `dtype` if given."""

    def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    return jax.tree.map(
        with_sharding, model.abstract_params(), experiment.partitioner.param_shardings(model)
    )


def init_params(experiment: Experiment) -> Params:
    """The student's parameters before training: given weights, or random ones, sharded."""
    student = experiment.student
    if student.initial_checkpoint is not None:
        logging.info("student: parameters from %s", student.initial_checkpoint)
        return load.load_params(
            student.initial_checkpoint, sharded_abstract_params(experiment, student.model)
        )
    logging.info("student: random parameters from seed %d", experiment.seed)
    init = jax.jit(
        student.model.init, out_shardings=experiment.partitioner.param_shardings(student.model)
    )
    return init(make_key(experiment.seed, Purpose.INIT))


def load_teacher(experiment: Experiment) -> Params | None:
    """The teacher's parameters in its compute dtype, sharded by the same rules; None for none."""
    teacher = experiment.teacher
    if teacher is None:
        return None
    logging.info("teacher: parameters from %s", teacher.checkpoint)
    dtype = jnp.dtype(teacher.model.config.dtype)
    return load.load_params(
        teacher.checkpoint, sharded_abstract_params(experiment, teacher.model, dtype=dtype)
    )


def student_to_use(experiment: Experiment) -> tuple[Params, int]:
    """The student's newest parameters in `model_dir`, or its initial ones, and their step.

    Raises:
      ValueError: there are neither.
    """
    student = experiment.student
    abstract = sharded_abstract_params(experiment, student.model)
    step = None
    if epath.Path(experiment.model_dir).is_dir():
        with CheckpointStore(experiment.model_dir, read_only=True) as store:
            step = None if store.latest_step() is None else store.choose()
    if step is not None:
        logging.info("student: parameters of step %d in %s", step, experiment.model_dir)
        return load.load_params(experiment.model_dir, abstract, step=step), step
    if student.initial_checkpoint is None:
        raise ValueError(
            f"there is no checkpoint in Experiment.model_dir ({experiment.model_dir}), and "
            "Student.initial_checkpoint is None. Set MODEL_DIR to a run's folder, or "
            "Student.initial_checkpoint to a checkpoint."
        )
    return init_params(experiment), 0


def jit_rollout(
    rollout: Rollout, model: LanguageModel, vocabulary: Vocabulary, partitioner: Partitioner
) -> Callable[[Params, Batch, Key[Array, ""]], Batch]:
    """Jits a rollout as `(params, batch, key)` to the batch with its outputs replaced."""

    def roll_out(params: Params, batch: Batch, key: Key[Array, ""]) -> Batch:
        return sample_outputs(
            model,
            params,
            batch,
            key=key,
            rollout=rollout,
            eos_ids=vocabulary.eos_ids,
            pad_id=vocabulary.pad_id,
        )

    return jax.jit(partitioner.annotate(roll_out), out_shardings=partitioner.batch_sharding)


@dataclasses.dataclass
class MetricSums:
    """Sums of (sum, weight) metrics on the device: adding does not wait for the step."""

    sums: dict[str, Metrics] = dataclasses.field(default_factory=dict)

    def add(self, group: str, metrics: Metrics) -> None:
        """Adds one step's metrics to those of its group."""
        present = self.sums.get(group)
        self.sums[group] = metrics if present is None else _add(present, metrics)

    def means(self) -> dict[str, float]:
        """Sum over weight of every metric as 'group/name'; metrics of weight 0 are left out."""
        host = jax.device_get(self.sums)
        return {
            f"{group}/{name}" if group else name: float(total) / float(weight)
            for group, metrics in host.items()
            for name, (total, weight) in metrics.items()
            if weight != 0
        }


@functools.partial(jax.jit, donate_argnums=0)
def _add(left: Metrics, right: Metrics) -> Metrics:
    return jax.tree.map(lambda a, b: a + b, left, right)
