"""What the run modes share: restored parameters, jitted functions, random keys."""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from gkd_jax.adapters import check_base, check_frozen, describe_frozen
from gkd_jax.appended import is_in_bucket
from gkd_jax.array_types import Array, Key, Metrics, Params, PyTree
from gkd_jax.batch import Batch
from gkd_jax.checkpoints import load
from gkd_jax.checkpoints.store import CheckpointStore
from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.experiment import Experiment
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.quantised import Int8
from gkd_jax.objectives.objective import Objective
from gkd_jax.partitioning import Partitioner, process_zero_decides
from gkd_jax.rollout import Rollout, mix_outputs, rollout_metrics, sample_outputs
from gkd_jax.teachers import Teacher
from gkd_jax.train_step import make_eval_step


class Purpose(enum.IntEnum):
    """What a random key is for. Numbers are part of a run's identity: never reuse one."""

    INIT = 0
    DROPOUT = 1
    ROLLOUT = 2
    EVALUATION = 3
    GENERATION = 4
    EVALUATION_SAMPLES = 5
    EXAMPLE_COIN = 6
    STORED_DRAWS = 7


def make_key(seed: int, purpose: Purpose, step: int = 0) -> Key[Array, ""]:
    """Derives the key of one purpose at one step from the run's seed."""
    key = jax.random.fold_in(jax.random.key(seed), int(purpose))
    return jax.random.fold_in(key, step)


def sharded_abstract_params(
    experiment: Experiment,
    model: LanguageModel,
    *,
    dtype: Any = None,
    partitioner: Partitioner | None = None,
) -> Params:
    """Shapes of a model's parameters with their shardings, in `dtype` if given.

    They lie as the student's do, where no other partitioner is given.
    """
    shardings = (partitioner or experiment.partitioner).param_shardings(model)

    def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, model.abstract_params(), shardings)


def abstract_network(experiment: Experiment, teacher: Teacher) -> Params:
    """Shapes of a network that teaches, as its checkpoint has it, lying as a teacher's do."""
    return sharded_abstract_params(
        experiment,
        teacher.model,
        dtype=jnp.dtype(teacher.model.config.dtype),
        partitioner=experiment.partitioner.of_teacher,
    )


def init_params(experiment: Experiment, *, dtype: Any = None) -> Params:
    """The parameters that are trained, before training: given or random, sharded.

    In `dtype` if given, else in float32. Those of a student with adapters are the adapters, which
    start from the run's seed.
    """
    student, partitioner = experiment.student, experiment.partitioner
    shardings, frozen = lora.split(student.model, partitioner.param_shardings(student.model))
    if frozen is None and student.initial_checkpoint is not None:
        logging.info("student: parameters from %s", student.initial_checkpoint)
        return load.load_params(
            student.initial_checkpoint,
            sharded_abstract_params(experiment, student.model, dtype=dtype),
        )
    what = "random parameters" if frozen is None else "random adapters"
    logging.info("student: %s from seed %d", what, experiment.seed)
    init = functools.partial(lora.init_trained, student.model)
    params = jax.jit(init, out_shardings=shardings)(make_key(experiment.seed, Purpose.INIT))
    return params if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def load_frozen(experiment: Experiment) -> Params | None:
    """The student's parameters that are not trained, sharded; None where all are trained.

    Those of a student with adapters are its base, restored in the base's dtype at every start.

    Raises:
      ValueError: there is no `Student.initial_checkpoint` to restore it from.
    """
    student = experiment.student
    abstract = sharded_abstract_params(experiment, student.model)
    _, frozen = lora.split(student.model, abstract)
    if frozen is None:
        return None
    check_base(experiment)
    assert student.initial_checkpoint is not None
    logging.info("student: frozen base from %s", student.initial_checkpoint)
    return load.load_params(student.initial_checkpoint, frozen)


def load_teacher(experiment: Experiment, *, frozen: Params | None = None) -> Params | None:
    """What the step is given of the teacher: parameters in their compute dtype, sharded.

    None where there is no teacher, or where the training state holds it. `frozen` is what
    `load_frozen` gave, if it was called: a base that teaches is then not restored again.
    """
    if experiment.teacher is None:
        return None

    def network(teacher: Teacher) -> Params:
        logging.info("teacher: parameters from %s", teacher.checkpoint)
        params = load.load_params(teacher.checkpoint, abstract_network(experiment, teacher))
        model = teacher.network
        if isinstance(model, Int8):
            shardings = experiment.partitioner.of_teacher.param_shardings(model)
            params = jax.jit(model.quantise, out_shardings=shardings)(params)
        return params

    def initial_student() -> Params:
        logging.info("teacher: the initial student")
        base = load_frozen(experiment) if frozen is None else frozen
        if base is not None:
            return base
        return init_params(experiment, dtype=jnp.dtype(experiment.student.model.config.dtype))

    return experiment.teacher.restore(network=network, initial_student=initial_student)


def newest_step(model_dir: str) -> int | None:
    """The step of the newest complete checkpoint of a run; None if it has none.

    Raises:
      ValueError: there are checkpoints, but none is complete.
    """
    if not is_in_bucket(model_dir) and not epath.Path(model_dir).is_dir():
        return None
    with CheckpointStore(model_dir, read_only=True) as store:
        return store.latest_step()


@dataclasses.dataclass(frozen=True)
class TrainedStudent:
    """Parameters of a student or teacher, the step that they are of, and where they come from."""

    params: Params
    step: int
    source: str


def student_to_use(experiment: Experiment, *, frozen: Params | None = None) -> TrainedStudent:
    """The student's newest parameters in `model_dir`, or else its initial ones.

    `frozen` is what `load_frozen` gave, if it was called.

    Raises:
      ValueError: there are neither.
    """
    return _newest(experiment, "params", frozen)


def teacher_to_use(experiment: Experiment, *, frozen: Params | None = None) -> TrainedStudent:
    """The teacher's parameters outside training.

    One that the training state holds comes from the newest checkpoint in `model_dir`; where there
    is none yet, it is still the initial student. `frozen` is what `load_frozen` gave, if it was
    called.

    Raises:
      ValueError: it is made from the student, and there are no parameters of that.
    """
    teacher = experiment.teacher
    assert teacher is not None
    source = teacher.source(experiment.start)
    if teacher.state_part is None:
        return TrainedStudent(load_teacher(experiment, frozen=frozen), 0, source)
    found = _newest(experiment, teacher.state_part, frozen)
    return dataclasses.replace(found, source=f"{source}, from {found.source}")


def _newest(experiment: Experiment, part: str, frozen: Params | None) -> TrainedStudent:
    """A part of the newest state in `model_dir`, shaped like the student, or the initial one."""
    model = experiment.student.model
    if process_zero_decides(lambda: newest_step(experiment.model_dir) or 0) == 0:
        if experiment.student.initial_checkpoint is None:
            raise ValueError(no_student(experiment))
        frozen = load_frozen(experiment) if frozen is None else frozen
        params = lora.join(init_params(experiment), frozen)
        return TrainedStudent(params, 0, experiment.student.initial_checkpoint)
    with CheckpointStore(experiment.model_dir, read_only=True) as store:
        step = store.choose()
        source = str(store.folder(step))
    logging.info("student: %s from %s", "parameters" if part == "params" else part, source)
    trained, _ = lora.split(model, sharded_abstract_params(experiment, model))
    params = load.load_params(source, trained, part=part)
    frozen = load_frozen(experiment) if frozen is None else frozen
    check_frozen(experiment, describe_frozen(frozen), load.describe_checkpoint(source).host)
    return TrainedStudent(lora.join(params, frozen), step, source)


def no_student(experiment: Experiment) -> str:
    """The message where neither the run nor the configuration has a student's parameters."""
    return (
        f"there is no checkpoint in Experiment.model_dir ({experiment.model_dir}), and "
        "Student.initial_checkpoint is None. Set MODEL_DIR to a run's folder, or "
        "Student.initial_checkpoint to a checkpoint."
    )


# The runs of a study share these functions, and with them what was compiled. Their arguments are
# compared by value.
@functools.cache
def jit_rollout(
    rollout: Rollout,
    model: LanguageModel,
    partitioner: Partitioner,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Callable[[Params, Batch, Key[Array, ""]], Batch]:
    """Jits a rollout as `(params, batch, key)` to the batch with its outputs replaced."""

    def roll_out(params: Params, batch: Batch, key: Key[Array, ""]) -> Batch:
        params = partitioner.gather_over_data(model, params)
        return sample_outputs(
            model, params, batch, key=key, rollout=rollout, eos_ids=eos_ids, pad_id=pad_id
        )

    return jax.jit(partitioner.annotate(roll_out), out_shardings=partitioner.batch_sharding)


def abstract_rollout(experiment: Experiment) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes of the batches that training samples, without what no objective reads."""
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
    if experiment.teacher is not None and experiment.teacher.num_components is not None:
        shapes["component"] = shapes["example_id"]
    own = None if experiment.teacher is None else experiment.teacher.own_tokens
    if data.teacher_chat is not None or own is not None:
        length = data.teacher_inputs_length if own is None else own.inputs_length
        for name in ("inputs", "inputs_mask"):
            wide = (inputs[0], length or data.teacher_inputs_length)
            shapes[f"teacher_{name}"] = jax.ShapeDtypeStruct(wide, shapes[name].dtype)
    return Batch(**shapes)


@functools.cache
def jit_mix_outputs(
    partitioner: Partitioner,
) -> Callable[[Batch, Batch, Array, Key[Array, ""]], Batch]:
    """Jits `rollout.mix_outputs` as `(batch, sampled, fraction, key)`."""

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
    """Drops what no objective reads, so that data and samples are batches of one type.

    A jitted function of both then compiles once.
    """
    return dataclasses.replace(batch, sample_log_probs=None)


@dataclasses.dataclass
class MetricSums:
    """Sums of (sum, weight) metrics on the device: adding does not wait for the step."""

    sums: dict[str, Metrics] = dataclasses.field(default_factory=dict)

    def add(self, group: str, metrics: Metrics) -> None:
        """Adds one step's metrics to those of its group."""
        present = self.sums.get(group, {})
        # Those of a run that was stopped may be of other settings.
        common = sorted(present.keys() & metrics.keys())
        added = _add(*({name: of[name] for name in common} for of in (present, metrics)))
        self.sums[group] = {**present, **metrics, **added}

    def to_host(self) -> dict[str, dict[str, list[float]]]:
        """The sums as plain numbers, for a checkpoint; `from_host` gives the very same back."""
        return {
            group: {
                name: [float(total), float(weight)] for name, (total, weight) in metrics.items()
            }
            for group, metrics in jax.device_get(self.sums).items()
        }

    @classmethod
    def from_host(cls, host: Mapping[str, Mapping[str, Sequence[float]]]) -> "MetricSums":
        """Goes on with sums that `to_host` gave."""
        return cls(
            {
                group: {
                    name: (np.float32(total), np.float32(weight))
                    for name, (total, weight) in metrics.items()
                }
                for group, metrics in host.items()
            }
        )

    def means(self) -> dict[str, float]:
        """As the function `means`, of the sums until now."""
        return means(self.to_host())


def means(sums: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Sum over weight of every metric as 'group/name'; metrics of weight 0 are left out."""
    return {
        f"{group}/{name}": total / weight
        for group, metrics in sums.items()
        for name, (total, weight) in metrics.items()
        if weight != 0
    }


def describe_vocabulary(vocabulary: Vocabulary) -> dict[str, Any]:
    """What a checkpoint tells of the vocabulary that its model was trained with, as JSON."""
    return {
        "name": vocabulary.name,
        "size": vocabulary.size,
        "fingerprint": vocabulary.fingerprint,
    }


@jax.jit
def _add(left: Metrics, right: Metrics) -> Metrics:
    return jax.tree.map(jnp.add, left, right)
