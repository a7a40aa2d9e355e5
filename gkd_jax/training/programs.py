"""The jitted functions of a run with the shapes of their arguments, for `compile_ahead`.

They are the same functions that training, rollouts and evaluations call. No file is read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.devices import flops
from gkd_jax.distillation import parameter_sources
from gkd_jax.distillation.replay import ReplayBuffer
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.step_objectives import measured_objective, on_policy_objective
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.quantised import Int8
from gkd_jax.models.wrapper import with_remat_policy
from gkd_jax.objectives import fused
from gkd_jax.training import jitted_functions, parameters, trainer

# Placeholders for token ids. The real ids are not used, because reading the vocabulary may require
# a file. The values of the ids do not affect the cost.
_TOKENS: dict[str, Any] = {"eos_ids": (1,), "pad_id": 0}


@dataclasses.dataclass(frozen=True)
class Function:
    """One jitted function of a run.

    Attributes:
      name: 'train step', 'rollout', 'evaluation' or 'divergence' (of an evaluation).
      function: the jitted function.
      arguments: shapes and shardings of its arguments.
      plain: the same function without rematerialisation; None if `function` has none.
      positions: number of output tokens in one evaluation of the loss, over all devices; 0 for a
        function without a loss.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    plain: Callable[..., Any] | None = None
    positions: int = 0


class Arguments:
    """Shapes and shardings of the arguments of a run's jitted functions."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        student = experiment.student_model
        abstract = parameters.sharded_abstract_params(experiment, student)
        _, self.frozen = lora.split(student, abstract)
        self.needs_teacher = experiment.objective.divergence.needs_teacher
        teacher = experiment.teacher if self.needs_teacher else None
        self.teacher_params = None
        if teacher is not None:
            self.teacher_params = teacher.restore(
                student, network=self._network, initial_student=self._initial_student
            )
        functions = self.step_functions(experiment.student_model)
        self.state = functions.abstract_state
        sharding = experiment.partitioner.batch_sharding
        self.batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            _batch(experiment),
        )
        # Like the keys of a run, this key has no sharding. The program compiled here is therefore
        # identical to the program of the run, so that the run finds it in JAX's compilation cache.
        self.key = jax.eval_shape(lambda: jax.random.key(0))

    def _network(self, teacher: Teacher) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns the shapes of the parameters that `load_teacher` restores for one network."""
        plain = parameters.abstract_network(self._experiment, teacher)
        model = teacher.network
        if not isinstance(model, Int8):
            return plain
        shardings = self._experiment.partitioner.for_teacher().param_shardings(model)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(model.quantise, plain),
            shardings,
        )

    def _initial_student(self) -> PyTree[jax.ShapeDtypeStruct]:
        model = self._experiment.student.model
        dtype = jnp.dtype(model.config.dtype)
        return parameters.sharded_abstract_params(self._experiment, model, dtype=dtype)

    def step_functions(self, student: LanguageModel) -> trainer.StepFunctions:
        """Returns the jitted functions of training.

        Args:
          student: the run's student, possibly with another remat policy.
        """
        return trainer.step_functions_of(
            self._experiment, _objective(self._experiment), student=student
        )

    @functools.cached_property
    def student(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes of all parameters of the student, trained and frozen."""
        return lora.join(self.state.params, self.frozen)

    @property
    def teaching_params(self) -> PyTree[jax.ShapeDtypeStruct] | None:
        """Shapes of the parameters of the teacher's model; None if training uses no teacher."""
        sources = trainer.teacher_sources(self._experiment)
        return parameter_sources.resolve(sources, self.state, self.teacher_params, self.frozen)

    def residents(self) -> dict[str, int]:
        """Returns the per-chip memory, in bytes, of the arrays that persist across steps.

        These arrays are parameters, optimizer state, teacher and replay buffer. Entries for arrays
        that the run does not have are left out.
        """
        found = {
            "student's parameters": self.state.params,
            "student's frozen parameters": self.frozen,
            "optimizer": self.state.opt_state,
            "average of the student": self.state.average,
            "teacher": self.teacher_params,
            "replay buffer": self._replay_buffer(),
        }
        return {what: size for what, tree in found.items() if (size := _bytes_a_chip(tree))}

    def _replay_buffer(self) -> PyTree[jax.ShapeDtypeStruct] | None:
        """Returns the shapes of the replay buffer that training allocates; None without one."""
        experiment = self._experiment
        if experiment.replay is None:
            return None
        kept = jitted_functions.abstract_rollout(experiment)
        return ReplayBuffer(
            experiment.replay, kept, experiment.partitioner, seed=experiment.seed
        ).abstract


def _objective(experiment: Experiment) -> Any:
    if experiment.outputs.student_data_fraction == 0:
        return measured_objective(experiment, experiment.train_data.vocabulary)
    return on_policy_objective(experiment)


def check_known(experiment: Experiment) -> None:
    """Checks that the jitted functions do not depend on the contents of files.

    Raises:
      ValueError: they depend on a file, which is not read; the message names the setting.
    """
    what = _unknown(experiment)
    if what:
        raise ValueError(f"--run_mode=compile_ahead reads no files, and {what}")


def _unknown(experiment: Experiment) -> str:
    teacher = experiment.teacher
    if teacher is None:
        return ""
    if teacher.store_for("train_data"):
        return (
            "a StoredTeacher's entries are in one. Set Experiment.teacher to the network that "
            "wrote them."
        )
    if teacher.own_tokens is not None:
        return (
            "what a CrossTokenizerTeacher shares with the student is in their vocabularies. Set "
            "Experiment.teacher to its teacher alone, which costs about as much."
        )
    return ""


def _batch(experiment: Experiment) -> Batch:
    """Returns the shapes of a training batch."""
    batch = jitted_functions.abstract_rollout(experiment)
    if not experiment.train_data.pack:
        return batch
    segments = {
        f"{name}_segments": value
        for name, value in vars(batch).items()
        if name in ("inputs", "targets", "teacher_inputs") and value is not None
    }
    if batch.source_id is not None:
        segments["source_id"] = batch.targets
    return dataclasses.replace(batch, **segments)


def _evaluation_batch(experiment: Experiment, batch: Batch) -> Batch:
    """Returns the shapes of an evaluation batch."""
    assert experiment.evaluation is not None
    data, sharding = experiment.evaluation.data, batch.inputs.sharding

    def rows(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((data.batch_size, *sizes), dtype, sharding=sharding)

    lengths = data.feature_lengths["inputs"], data.feature_lengths["targets"]
    return Batch(
        inputs=rows(jnp.int32, lengths[0]),
        inputs_mask=rows(jnp.bool_, lengths[0]),
        targets=rows(jnp.int32, lengths[1]),
        loss_weights=rows(jnp.float32, lengths[1]),
        example_id=rows(jnp.int32),
        source_id=None if batch.source_id is None else rows(jnp.int32),
        # The teacher's own prompts have the same length as in training.
        teacher_inputs=_with_rows(batch.teacher_inputs, data.batch_size),
        teacher_inputs_mask=_with_rows(batch.teacher_inputs_mask, data.batch_size),
    )


def _bytes_a_chip(tree: PyTree[Any]) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def functions_of(experiment: Experiment, arguments: Arguments) -> Iterator[Function]:
    """Yields each jitted function of the run."""
    yield _train_step(experiment, arguments)
    if experiment.outputs.student_data_fraction != 0:
        yield _rollout(experiment, arguments)
    if experiment.evaluation is not None:
        yield from _evaluation_functions(experiment, arguments)


def _train_step(experiment: Experiment, arguments: Arguments) -> Function:
    batch = arguments.batch
    if experiment.reward is not None:
        batch = dataclasses.replace(batch, advantages=batch.loss_weights)
    student = experiment.student_model
    plain = with_remat_policy(student, "none")
    values = (arguments.state, arguments.teacher_params, batch, arguments.key, arguments.frozen)
    return Function(
        "train step",
        arguments.step_functions(student).step,
        values,
        None if plain == student else arguments.step_functions(plain).step,
        batch.targets.size // experiment.num_microbatches,
    )


def flops_of_step(experiment: Experiment) -> float | None:
    """Returns the FLOPs of a training step over all devices; None if they depend on files.

    The FLOPs are counted before compilation and without rematerialisation, as if all positions of
    the outputs had a nonzero loss weight.
    """
    if _unknown(experiment):
        return None
    step = _train_step(experiment, Arguments(experiment))
    function = step.plain or step.function
    return flops.traced(function, *step.arguments, unknown_trips=num_chunks(experiment, step))


def num_chunks(experiment: Experiment, one: Function) -> int:
    """Returns the number of chunks in the loop of the loss, if all positions have weight > 0."""
    partitioner = experiment.partitioner
    positions = max(1, one.positions // partitioner.smallest_batch)
    entries, parts = experiment.student_model.vocab_size, partitioner.mesh.shape["model"]
    if entries % parts == 0:
        entries //= parts
    size = fused.chunk_positions(entries, positions, platform="tpu")
    return -(-positions // size)


def _rollout(experiment: Experiment, arguments: Arguments) -> Function:
    assistance, writer = experiment.rollout.teacher_assistance, experiment.student_model
    params = arguments.student
    if assistance is not None:
        assert experiment.teacher_model is not None
        writer = assistance.combine(writer, experiment.teacher_model)
        params = (params, arguments.teaching_params)
    function = jitted_functions.jit_rollout(
        experiment.rollout, writer, experiment.partitioner, **_TOKENS
    )
    return Function(
        "rollout", function, (params, _prompts(experiment, arguments.batch), arguments.key)
    )


def _evaluation_functions(experiment: Experiment, arguments: Arguments) -> Iterator[Function]:
    """Yields the decoding function and, if it is configured, the evaluation of the objective."""
    evaluation, partitioner = experiment.evaluation, experiment.partitioner
    assert evaluation is not None
    batch = _evaluation_batch(experiment, arguments.batch)
    decode = jitted_functions.jit_rollout(
        Rollout(method=evaluation.method), experiment.student.model, partitioner, **_TOKENS
    )
    yield Function("evaluation", decode, (arguments.student, batch, arguments.key))
    if evaluation.num_divergence_examples == 0:
        return
    teacher = experiment.teacher_model if arguments.needs_teacher else None
    objective = measured_objective(experiment, experiment.train_data.vocabulary)
    divergence = jitted_functions.jit_eval_step(
        experiment.student_model, teacher, objective, partitioner
    )
    values = (arguments.student, arguments.teaching_params, batch)
    yield Function("divergence", divergence, values, positions=batch.targets.size)


def _prompts(experiment: Experiment, batch: Any) -> Any:
    """Returns the shapes of a rollout's input: one row per prompt instead of one per sample."""
    rows = _with_rows(batch, experiment.train_data.batch_size)
    return dataclasses.replace(rows, advantages=None)


def _with_rows(tree: Any, number: int) -> Any:
    """Returns the same shapes with another number of rows."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(one, tree)
