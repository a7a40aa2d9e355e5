"""Sharded parameters of student and teacher, restored from checkpoints or initialized."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from gkd_jax.checkpoints import load
from gkd_jax.checkpoints.manager import CheckpointManager, newest_step
from gkd_jax.common.array_types import Params
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.devices.processes import process_zero_decides
from gkd_jax.distillation import parameter_sources
from gkd_jax.distillation.parameter_sources import FrozenBase
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.distillation.train_state import TrainState
from gkd_jax.experiment.checks.adapters import check_base, check_frozen, describe_frozen
from gkd_jax.experiment.checks.models import no_student
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.quantised import Int8
from gkd_jax.training.keys import Purpose, make_key


def sharded_abstract_params(
    experiment: Experiment,
    model: LanguageModel,
    *,
    dtype: Any = None,
    partitioner: Partitioner | None = None,
) -> Params:
    """Returns the shapes of a model's parameters with their shardings.

    Args:
      experiment: the run.
      model: the student's or a teacher's model.
      dtype: dtype of all parameters; None uses the dtypes that the model defines.
      partitioner: defines the shardings; None for the student's partitioner.
    """
    shardings = (partitioner or experiment.partitioner).param_shardings(model)

    def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, model.abstract_params(), shardings)


def abstract_network(experiment: Experiment, teacher: Teacher) -> Params:
    """Returns the shapes of the parameters that a teacher's checkpoint stores, with shardings.

    The dtype is the compute dtype of the network. If the network is quantised, these are the shapes
    before quantisation.
    """
    return sharded_abstract_params(
        experiment,
        teacher.model,
        dtype=jnp.dtype(teacher.model.config.dtype),
        partitioner=experiment.partitioner.for_teacher(),
    )


def init_params(experiment: Experiment, *, dtype: Any = None) -> Params:
    """Returns the initial values of the student's trainable parameters, sharded.

    They are restored from `Student.initial_checkpoint`, or initialized from the run's seed. In a
    student with adapters, only the adapters are trained; they are always initialized from the seed.

    Args:
      experiment: the run.
      dtype: dtype of the parameters; None for float32.
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
    """Restores the student's frozen parameters, sharded; None if all parameters are trainable.

    In a student with adapters, the parameters of the base model are frozen. Every start of a run
    restores them from `Student.initial_checkpoint`, in the dtype of the base model.

    Raises:
      ValueError: there is no `Student.initial_checkpoint` to restore them from.
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


def load_teacher(experiment: Experiment) -> Params | None:
    """Restores the teacher's parameters, sharded and in the compute dtype of each network.

    Returns:
      The argument `teacher_params` of the jitted step (see `distillation.parameter_sources`). None
      if there is no teacher, or if none of the teacher's parameters have to be restored.
    """
    if experiment.teacher is None:
        return None

    def network(teacher: Teacher) -> Params:
        logging.info("teacher: parameters from %s", teacher.checkpoint)
        params = load.load_params(teacher.checkpoint, abstract_network(experiment, teacher))
        model = teacher.network
        if isinstance(model, Int8):
            shardings = experiment.partitioner.for_teacher().param_shardings(model)
            params = jax.jit(model.quantise, out_shardings=shardings)(params)
        return params

    def initial_student() -> Params:
        logging.info("teacher: the initial student")
        return init_params(experiment, dtype=jnp.dtype(experiment.student.model.config.dtype))

    return experiment.teacher.restore(
        experiment.student_model, network=network, initial_student=initial_student
    )


@dataclasses.dataclass(frozen=True)
class LoadedParams:
    """Parameters of a model, for use outside training.

    Attributes:
      params: the parameters, sharded.
      step: step after which the parameters were saved; 0 if they are not from this run.
      source: description of the parameters' origin, such as the path of a checkpoint.
    """

    params: Params
    step: int
    source: str


@dataclasses.dataclass(frozen=True)
class _SavedState:
    """The run's newest training state. Fields of `state` that were not requested are None."""

    state: TrainState
    frozen: Params | None
    step: int
    source: str


def student_to_use(experiment: Experiment, *, frozen: Params | None = None) -> LoadedParams:
    """Loads the student's newest parameters from `model_dir`.

    If `model_dir` has no checkpoint, the initial parameters are loaded instead.

    Args:
      experiment: the run.
      frozen: frozen parameters as returned by `load_frozen`; None loads them if needed.

    Raises:
      ValueError: there are neither saved nor initial parameters.
    """
    saved = _newest_state(experiment, ("params",), frozen)
    params = lora.join(saved.state.params, saved.frozen)
    return LoadedParams(params, saved.step, saved.source)


def teacher_to_use(experiment: Experiment, *, frozen: Params | None = None) -> LoadedParams:
    """Loads the parameters of the teacher's model outside training.

    Teacher parameters that are part of the training state, such as the average of the student, are
    read from the newest checkpoint in `model_dir`. If there is no checkpoint yet, the parameters of
    the initial student are used instead.

    Args:
      experiment: the run.
      frozen: frozen parameters as returned by `load_frozen`; None loads them if needed.

    Raises:
      ValueError: the teacher is derived from the student, which has neither saved nor initial
        parameters.
    """
    teacher = experiment.teacher
    assert teacher is not None
    sources = teacher.parameter_sources(experiment.student_model)
    source, step, state = teacher.describe(experiment.start), 0, None
    teacher_params = load_teacher(experiment)
    fields = parameter_sources.state_fields(sources)
    if fields:
        saved = _newest_state(experiment, fields, frozen)
        source, step = f"{source}, from {saved.source}", saved.step
        state, frozen = saved.state, saved.frozen
    elif frozen is None and any(isinstance(one, FrozenBase) for one in sources):
        frozen = load_frozen(experiment)
    params = parameter_sources.resolve(sources, state, teacher_params, frozen)
    return LoadedParams(params, step, source)


def _newest_state(
    experiment: Experiment, fields: Sequence[str], frozen: Params | None
) -> _SavedState:
    """Loads some fields of the newest state in `model_dir`, such as 'params' and 'average'.

    If there is no checkpoint, every field is set to the parameters of the initial student.
    """
    model = experiment.student.model
    if process_zero_decides(lambda: newest_step(experiment.model_dir) or 0) == 0:
        if experiment.student.initial_checkpoint is None:
            raise ValueError(no_student(experiment))
        frozen = load_frozen(experiment) if frozen is None else frozen
        initial = init_params(experiment)
        state = _state_of(dict.fromkeys(fields, initial), step=0)
        return _SavedState(state, frozen, 0, experiment.student.initial_checkpoint)
    with CheckpointManager(experiment.model_dir, read_only=True) as manager:
        step = manager.choose()
        source = str(manager.folder(step))
    trained, _ = lora.split(model, sharded_abstract_params(experiment, model))
    loaded = {}
    for field in fields:
        logging.info("student: %s from %s", "parameters" if field == "params" else field, source)
        loaded[field] = load.load_params(source, trained, field=field)
    frozen = load_frozen(experiment) if frozen is None else frozen
    check_frozen(experiment, describe_frozen(frozen), load.describe_checkpoint(source).host)
    return _SavedState(_state_of(loaded, step=step), frozen, step, source)


def _state_of(fields: Mapping[str, Params], *, step: int) -> TrainState:
    return TrainState(
        step=jnp.int32(step),
        params=fields.get("params"),
        opt_state=None,
        average=fields.get("average"),
    )
