"""Run mode `compile_ahead`: what a run needs of a TPU slice, on a machine without one.

The functions that training jits, its rollouts and the decoding of evaluations are compiled for the
chips that are named, by the compiler that will run there (libtpu). Nothing is run, and no
checkpoint is read.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from gkd_jax import chips, flops, hlo, runtime, trainer
from gkd_jax.array_types import PyTree
from gkd_jax.batch import Batch
from gkd_jax.chips import CHIPS, GIB
from gkd_jax.experiment import Experiment
from gkd_jax.models import lora
from gkd_jax.models.quantised import Int8
from gkd_jax.objectives import fused
from gkd_jax.reward_scorer import on_policy_objective
from gkd_jax.rollout import Rollout
from gkd_jax.teacher_tokens import measured_objective
from gkd_jax.teachers import Teacher

_MIB = 1 << 20
_MOST_MICROBATCHES = 16
_TRIED_SLICES = 4


class DoesNotFitError(ValueError):
    """A part of the run needs more memory than a chip has."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One compiled function.

    Attributes:
      name: 'train step', 'rollout' or 'evaluation'.
      temporaries: bytes a chip beside what lies there all the time; None where it does not fit.
      needed: the same as the compiler's message has it, where it does not fit.
      seconds_to_compile: by this machine.
      cost: of one run on one chip.
      traced: FLOPs of one run on all chips, as the function is written.
    """

    name: str
    temporaries: int | None
    needed: str
    seconds_to_compile: float
    cost: hlo.Cost
    traced: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run needs of a slice.

    Attributes:
      topology: such as 'v5e:4x4'.
      mesh: axes and their sizes.
      residents: bytes a chip of what lies there all the time, by what it is.
      parts: what was compiled.
    """

    topology: str
    mesh: dict[str, int]
    residents: dict[str, int]
    parts: list[Part]

    @property
    def chip(self) -> chips.Chip:
        """What each of the chips can do."""
        return CHIPS[chips.parse_topology(self.topology)[0]]

    def fits_part(self, part: Part) -> bool:
        """Whether one does, beside what lies there all the time."""
        resident = sum(self.residents.values())
        return part.temporaries is not None and resident + part.temporaries <= self.chip.memory

    @property
    def fits(self) -> bool:
        """Whether every part does."""
        return all(self.fits_part(part) for part in self.parts)

    def table(self) -> str:
        """The report as text."""
        chip = self.chip
        num_chips = math.prod(self.mesh.values())
        resident = sum(self.residents.values())
        lines = [
            f"{self.topology}: {num_chips} chips of {chip.memory / GIB:.0f} GiB, mesh "
            + " x ".join(f"{name} {size}" for name, size in self.mesh.items()),
            "",
            "| lies on each chip | MiB |",
            "|---|---|",
            *(f"| {what} | {size / _MIB:,.1f} |" for what, size in self.residents.items()),
            "",
            "| part | temporaries, MiB | in all, of the chip | GFLOPs a chip | of those traced |"
            " GB of memory | MB sent | least seconds | bound by | compiled in |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for part in self.parts:
            if part.temporaries is None:
                lines.append(f"| {part.name} | does not fit: {part.needed} | | | | | | | | |")
                continue
            cost, share = part.cost, (resident + part.temporaries) / chip.memory
            seconds, bound = roofline(cost, chip)
            traced = cost.flops * num_chips / part.traced if part.traced else math.nan
            lines.append(
                f"| {part.name} | {part.temporaries / _MIB:,.1f} | {share:.1%} | "
                f"{cost.flops / 1e9:,.1f} | {traced:.2f} | {cost.bytes / 1e9:,.2f} | "
                f"{cost.sent / 1e6:,.1f} | {seconds:.4f} | {bound} | "
                f"{part.seconds_to_compile:.0f} s |"
            )
        sent = [
            f"{part.name}: "
            + ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in kinds.items())
            for part in self.parts
            if (kinds := {k: v for k, v in sorted(part.cost.collectives.items()) if v})
        ]
        if sent:
            lines += ["", "sent by each chip:", *sent]
        guessed = [
            f"{part.name}: {part.cost.unknown_loops}"
            for part in self.parts
            if part.cost.unknown_loops
        ]
        if guessed:
            lines += ["", "loops whose length depends on data, counted at the loss's longest:"]
            lines += guessed
        return "\n".join(lines)


def roofline(cost: hlo.Cost, chip: chips.Chip) -> tuple[float, str]:
    """The least time that a chip can take, and what it then waits for."""
    times = {
        "compute": cost.flops / chip.flops,
        "memory": cost.bytes / chip.bandwidth,
        "interconnect": cost.sent / chip.interconnect,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def compile_ahead(experiment: Experiment) -> str:
    """Compiles a run for `Experiment.topology`; returns what it needs there, as a table.

    Raises:
      DoesNotFitError: it needs more memory than there is; says what would fit.
      ValueError: no such topology, no libtpu, or the mesh does not suit the model.
    """
    topology = experiment.topology
    if topology is None:
        raise ValueError(
            "--run_mode=compile_ahead compiles for a slice of TPUs; got TOPOLOGY None. Set it "
            "(Experiment.topology), for example --gin.TOPOLOGY='\"v5e:4x4\"'."
        )
    chips.parse_topology(topology)
    report = compile_for(experiment, topology)
    if report.fits:
        return report.table()
    raise DoesNotFitError(
        f"the run does not fit on {topology}.\n\n{report.table()}\n\n"
        + "\n".join(_remedies(experiment, report))
    )


def compile_for(experiment: Experiment, topology: str) -> Report:
    """Compiles every part of a run for a slice."""
    experiment = on_topology(experiment, topology)
    partitioner = experiment.partitioner
    partitioner.check_batch_size(experiment.train_data.batch_size, experiment.num_microbatches)
    if experiment.evaluation is not None:
        partitioner.check_batch_size(experiment.evaluation.data.batch_size)
    arguments = _Arguments(experiment)
    parts = [
        _compile(name, function, values, unknown_trips=_chunks(experiment))
        for name, function, values in _functions(experiment, arguments)
    ]
    return Report(topology, dict(partitioner.mesh.shape), arguments.residents(), parts)


def on_topology(experiment: Experiment, topology: str) -> Experiment:
    """The experiment on the devices of a slice that is not there.

    Raises:
      ValueError: libtpu is not installed.
    """
    # libtpu would ask the machine's metadata, and keep other processes out.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(topology, platform="tpu")
    except Exception as error:
        raise ValueError(
            f"no compiler for {topology}: {error}. Install it with pip install libtpu, of the "
            "version that `pip install 'jax[tpu]'` names."
        ) from error
    devices = tuple(description.devices)
    partitioner = dataclasses.replace(experiment.partitioner, devices=devices)
    return dataclasses.replace(experiment, partitioner=partitioner)


class _Arguments:
    """Shapes and shardings of what the run's functions are given."""

    def __init__(self, experiment: Experiment):
        _check_known(experiment)
        self._experiment = experiment
        student = experiment.student_model
        abstract = runtime.sharded_abstract_params(experiment, student)
        _, self.frozen = lora.split(student, abstract)
        self.needs_teacher = experiment.objective.divergence.needs_teacher
        teacher = experiment.teacher if self.needs_teacher else None
        self.teacher = None
        if teacher is not None:
            self.teacher = teacher.restore(
                network=self._network, initial_student=self._initial_student
            )
        functions = self.step_functions()
        self.state = functions.abstract_state
        sharding = experiment.partitioner.batch_sharding
        self.batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            _batch(experiment),
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        self.key = jax.ShapeDtypeStruct(
            key.shape, key.dtype, sharding=experiment.partitioner.replicated
        )

    def _network(self, teacher: Teacher) -> PyTree[jax.ShapeDtypeStruct]:
        """As `runtime.load_teacher` makes them."""
        dtype = jnp.dtype(teacher.model.config.dtype)
        model = teacher.network
        if not isinstance(model, Int8):
            return runtime.sharded_abstract_params(self._experiment, model, dtype=dtype)
        plain = runtime.sharded_abstract_params(self._experiment, teacher.model, dtype=dtype)
        shardings = self._experiment.partitioner.param_shardings(model)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(model.quantise, plain),
            shardings,
        )

    def _initial_student(self) -> PyTree[jax.ShapeDtypeStruct]:
        if self.frozen is not None:
            return self.frozen
        model = self._experiment.student.model
        dtype = jnp.dtype(model.config.dtype)
        return runtime.sharded_abstract_params(self._experiment, model, dtype=dtype)

    def step_functions(self) -> trainer.StepFunctions:
        experiment = self._experiment
        teacher = experiment.teacher if self.needs_teacher else None
        return trainer.jit_step_functions(
            experiment.student_model,
            experiment.teacher_model if teacher else None,
            _objective(experiment),
            experiment.optimizer,
            experiment.partitioner,
            num_microbatches=experiment.num_microbatches,
            teacher_part=teacher.state_part if teacher else None,
            average_decay=teacher.average_decay if teacher else None,
        )

    def residents(self) -> dict[str, int]:
        """Bytes a chip of what lies there from step to step."""
        found = {
            "student's parameters": self.state.params,
            "student's frozen parameters": self.frozen,
            "optimizer": self.state.opt_state,
            "average of the student": self.state.average,
            # A base that teaches is there once.
            "teacher": None if self.teacher is self.frozen else self.teacher,
        }
        return {what: size for what, tree in found.items() if (size := _bytes_a_chip(tree))}


def _objective(experiment: Experiment) -> Any:
    if experiment.outputs.student_data_fraction == 0:
        return measured_objective(experiment, experiment.train_data.vocabulary)
    return on_policy_objective(experiment)


def _check_known(experiment: Experiment) -> None:
    """Refuses what is known from files only, which are not read.

    Raises:
      ValueError: naming the setting.
    """
    teacher = experiment.teacher
    if teacher is None:
        return
    if teacher.store_for("train_data"):
        raise ValueError(
            "--run_mode=compile_ahead reads no files, and a StoredTeacher's entries are in one. "
            "Set Experiment.teacher to the network that wrote them."
        )
    if teacher.own_tokens is not None:
        raise ValueError(
            "--run_mode=compile_ahead reads no files, and what a CrossTokenizerTeacher shares with "
            "the student is in their vocabularies. Set Experiment.teacher to its teacher alone, "
            "which costs about as much."
        )


def _batch(experiment: Experiment) -> Batch:
    """Shapes of a training batch."""
    batch = runtime.abstract_rollout(experiment)
    if not experiment.train_data.pack:
        return batch
    segments = {
        f"{name}_segments": value
        for name, value in vars(batch).items()
        if name in ("inputs", "targets", "teacher_inputs") and value is not None
    }
    if batch.component is not None:
        segments["component"] = batch.targets
    return dataclasses.replace(batch, **segments)


def _evaluation_batch(experiment: Experiment, batch: Batch) -> Batch:
    """Shapes of the prompts that an evaluation decodes."""
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
    )


def _bytes_a_chip(tree: PyTree[Any]) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _functions(
    experiment: Experiment, arguments: _Arguments
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Each jitted function of the run with the shapes of its arguments."""
    batch = arguments.batch
    if experiment.reward is not None:
        batch = dataclasses.replace(batch, advantages=batch.loss_weights)
    teacher = arguments.teacher
    step = (arguments.state, teacher, batch, arguments.key, arguments.frozen)
    yield "train step", arguments.step_functions().step, step
    vocabulary = experiment.train_data.vocabulary
    try:
        ids = {"eos_ids": vocabulary.eos_ids, "pad_id": vocabulary.pad_id}
    except FileNotFoundError:  # Which ids they are changes no cost.
        ids = {"eos_ids": (1,), "pad_id": 0}
    student, partitioner = experiment.student_model, experiment.partitioner
    params = lora.join(arguments.state.params, arguments.frozen)
    if experiment.outputs.student_data_fraction != 0:
        policy, writer, writer_params = experiment.rollout.policy, student, params
        if policy is not None:
            assert experiment.teacher_model is not None
            writer = policy.combine(student, experiment.teacher_model)
            writer_params = (params, params if teacher is None else teacher)
        function = runtime.jit_rollout(experiment.rollout, writer, partitioner, **ids)
        yield "rollout", function, (writer_params, _prompts(experiment, batch), arguments.key)
    if experiment.evaluation is not None:
        decoding = Rollout(method=experiment.evaluation.method)
        function = runtime.jit_rollout(decoding, experiment.student.model, partitioner, **ids)
        prompts = _evaluation_batch(experiment, batch)
        yield "evaluation", function, (params, prompts, arguments.key)


def _prompts(experiment: Experiment, batch: Any) -> Any:
    """A rollout's prompts: one for each group of samples."""
    size = experiment.train_data.batch_size
    rows = jax.tree.map(lambda leaf: _with_rows(leaf, size), batch)
    return dataclasses.replace(rows, advantages=None)


def _with_rows(leaf: jax.ShapeDtypeStruct, number: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((number, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)


def _compile(
    name: str,
    function: Callable[..., Any],
    values: tuple[Any, ...],
    *,
    unknown_trips: int,
) -> Part:
    logging.info("compiling: %s", name)
    start = time.monotonic()
    traced = flops.traced(function, *values, unknown_trips=unknown_trips)
    try:
        compiled = function.lower(*values).compile()  # type: ignore[attr-defined]
    except jax.errors.JaxRuntimeError as error:
        needed = _out_of_memory(error)
        if needed is None:
            raise
        return Part(name, None, needed, time.monotonic() - start, hlo.Cost(), traced)
    memory = compiled.memory_analysis()
    temporaries = (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    cost = hlo.cost(compiled.as_text(), unknown_trips=unknown_trips)
    return Part(name, int(temporaries), "", time.monotonic() - start, cost, traced)


def _chunks(experiment: Experiment) -> int:
    """How often the loss's loop over chunks of positions runs, if every position counts."""
    mesh = experiment.partitioner.mesh.shape
    rows = experiment.train_data.batch_size * experiment.rollout.num_samples
    lengths = experiment.train_data.feature_lengths
    positions = rows // experiment.num_microbatches // mesh["data"] * lengths["targets"]
    entries = experiment.student_model.vocab_size
    size = fused.chunk_positions(entries, positions, platform="tpu")
    return -(-positions // size)


def _out_of_memory(error: Exception) -> str | None:
    """What the compiler says of memory; None where the error is another."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", text)
    return f"{used[1]} of {used[2]}" if used else "more than a chip has"


def _remedies(experiment: Experiment, report: Report) -> Iterator[str]:
    """What would fit, seen by compiling it."""
    per_device = experiment.train_data.batch_size // report.mesh["data"]
    step = next(part for part in report.parts if part.name == "train step")
    microbatches = experiment.num_microbatches
    while not report.fits_part(step) and (microbatches := 2 * microbatches) <= _MOST_MICROBATCHES:
        if per_device % microbatches:
            break
        tried = dataclasses.replace(experiment, num_microbatches=microbatches)
        if compile_for(tried, report.topology).fits:
            yield f"It fits there with NUM_MICROBATCHES = {microbatches}."
            break
    for topology in chips.larger(report.topology)[:_TRIED_SLICES]:
        try:
            other = compile_for(experiment, topology)
        except ValueError as error:
            yield f"{topology} does not suit the run: {error}"
            return
        if other.fits:
            yield f"The smallest slice of these chips that it fits on is {topology}:"
            yield ""
            yield other.table()
            return
    yield "No slice that was tried is large enough; see REMAT_POLICY and PARTITIONING_RULES."
