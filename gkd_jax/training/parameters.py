"""Parameters of student and teacher: restored or made, sharded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from gkd_jax.checkpoints import load
from gkd_jax.checkpoints.manager import CheckpointManager, newest_step
from gkd_jax.common.array_types import Params
from gkd_jax.devices.partitioning import Partitioner, process_zero_decides
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment.checks.adapters import check_base, check_frozen, describe_frozen
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.prepare import no_student
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
    with CheckpointManager(experiment.model_dir, read_only=True) as manager:
        step = manager.choose()
        source = str(manager.folder(step))
    logging.info("student: %s from %s", "parameters" if part == "params" else part, source)
    trained, _ = lora.split(model, sharded_abstract_params(experiment, model))
    params = load.load_params(source, trained, part=part)
    frozen = load_frozen(experiment) if frozen is None else frozen
    check_frozen(experiment, describe_frozen(frozen), load.describe_checkpoint(source).host)
    return TrainedStudent(lora.join(params, frozen), step, source)
