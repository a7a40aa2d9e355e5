"""Run mode `compile_ahead`: reports what a run needs on a TPU slice, without access to the slice.

The training step, the rollout and the functions of the evaluation are compiled for the given
topology by the TPU's own compiler (libtpu). The report has memory, FLOPs, traffic and time.
Nothing is executed and no checkpoint is read.
"""

import dataclasses
import os
import pathlib
import re
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import jax
from absl import logging

from gkd_jax.devices import chips, flops, hlo
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.run_modes.compile_report import Part, Report
from gkd_jax.training.programs import Arguments, Function, check_known, functions_of, num_chunks

_MOST_MICROBATCHES = 16
_TRIED_SLICES = 4


class DoesNotFitError(ValueError):
    """A function of the run needs more memory than a chip has."""


def compile_ahead(experiment: Experiment) -> str:
    """Compiles a run for `Experiment.topology` and returns the report as text.

    Raises:
      DoesNotFitError: the run needs more memory than the chips have. The message suggests remedies.
      ValueError: the topology does not exist, libtpu is not installed, or the mesh does not fit the
        model.
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


def compile_for(
    experiment: Experiment,
    topology: str,
    *,
    stop_where_it_does_not_fit: bool = False,
    names: Collection[str] | None = None,
) -> Report:
    """Compiles the functions of a run for a slice.

    Args:
      experiment: the run.
      topology: the slice, such as 'v5e:4x4'.
      stop_where_it_does_not_fit: whether to stop after the first function that does not fit.
      names: names of the functions to compile, such as 'train step'; None for all.
    """
    experiment = on_topology(experiment, topology)
    partitioner = experiment.partitioner
    partitioner.check_batch_size(experiment.train_data.batch_size, experiment.num_microbatches)
    if experiment.evaluation is not None:
        partitioner.check_batch_size(experiment.evaluation.data.batch_size)
    check_known(experiment)
    arguments = Arguments(experiment)
    report = Report(topology, dict(partitioner.mesh.shape), arguments.residents(), [])
    for function in functions_of(experiment, arguments):
        if names is not None and function.name not in names:
            continue
        report.parts.append(
            _compile(
                function,
                unknown_trips=num_chunks(experiment, function),
                slice_size=report.num_chips // partitioner.num_slices_of_mesh,
            )
        )
        if stop_where_it_does_not_fit and not report.fits:
            break
    return report


def on_topology(experiment: Experiment, topology: str) -> Experiment:
    """Returns the experiment with a mesh of a slice's devices, which need not be attached.

    Raises:
      ValueError: libtpu is not installed.
    """
    # Without these variables, libtpu queries the machine's metadata server and locks out other
    # processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    parsed = chips.parse_topology(topology)
    several = {"num_slices": parsed.num_slices} if parsed.num_slices > 1 else {}
    try:
        description = topologies.get_topology_desc(parsed.of_one_slice, platform="tpu", **several)
    except Exception as error:
        raise ValueError(
            f"no compiler for {topology}: {error}. Install it with pip install libtpu, of the "
            "version that `pip install 'jax[tpu]'` names."
        ) from error
    devices = tuple(description.devices)
    partitioner = dataclasses.replace(experiment.partitioner, devices=devices)
    return dataclasses.replace(experiment, partitioner=partitioner)


def _compile(one: Function, *, unknown_trips: int, slice_size: int) -> Part:
    logging.info("compiling: %s", one.name)
    start = time.monotonic()
    traced = flops.traced(one.function, *one.arguments, unknown_trips=unknown_trips)
    recomputed = 0.0
    if one.plain is not None:
        least = flops.traced(one.plain, *one.arguments, unknown_trips=unknown_trips)
        recomputed = traced - least
    try:
        compiled, text = _compiled(one)
    except jax.errors.JaxRuntimeError as error:
        needed = _out_of_memory(error)
        if needed is None:
            raise
        seconds = time.monotonic() - start
        return Part(one.name, None, needed, seconds, hlo.Cost(), traced, recomputed)
    memory = compiled.memory_analysis()
    temporaries = (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    seconds = time.monotonic() - start
    cost = hlo.cost(text, unknown_trips=unknown_trips, slice_size=slice_size)
    return Part(one.name, int(temporaries), "", seconds, cost, traced, recomputed)


def _compiled(one: Function) -> tuple[Any, str]:
    """Returns the compiled function, and its program as text.

    The text is read from the compiler's dump if there is one, otherwise from jaxlib's `as_text`.
    The dump is preferred because `as_text` parses the program and may fail: for example, it did not
    know the asynchronous gathers on the sparse cores of v5p.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        lowered = one.function.lower(*one.arguments)  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            # JAX cannot load cached programs without the chips.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = lowered.compile(compiler_options=options)
        files = list(pathlib.Path(folder).glob("*.after_optimizations.txt"))
        if not files:
            return compiled, compiled.as_text()
        return compiled, max(files, key=lambda file: file.stat().st_size).read_text()


def _out_of_memory(error: Exception) -> str | None:
    """Returns the memory that an out-of-memory error names; None for other errors."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", text) or re.search(
        r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", text
    )
    return f"{used[1]} of {used[2]}" if used else "more than a chip has"


def _remedies(experiment: Experiment, report: Report) -> Iterator[str]:
    """Yields lines about changes that make the run fit. Each change is tested by compiling."""
    shards = report.mesh["data"] * report.mesh.get("slice", 1)
    per_device = experiment.train_data.batch_size // shards
    step = next(part for part in report.parts if part.name == "train step")
    microbatches = experiment.num_microbatches
    while not report.fits_part(step) and (microbatches := 2 * microbatches) <= _MOST_MICROBATCHES:
        if per_device % microbatches:
            break
        tried = dataclasses.replace(experiment, num_microbatches=microbatches)
        if compile_for(tried, report.topology, stop_where_it_does_not_fit=True).fits:
            yield f"It fits there with NUM_MICROBATCHES = {microbatches}."
            break
    for topology in chips.larger(report.topology)[:_TRIED_SLICES]:
        try:
            other = compile_for(experiment, topology, stop_where_it_does_not_fit=True)
        except ValueError as error:
            yield f"{topology} does not suit the run: {error}"
            return
        if other.fits:
            yield f"The smallest slice of these chips that it fits on is {topology}:"
            yield ""
            yield other.table()
            return
    yield "No slice that was tried is large enough; see REMAT_POLICY and PARTITIONING_RULES."
