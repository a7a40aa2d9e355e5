"""Timing and profiling: seconds of the phases of a step, and traces for a profiler."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from gkd_jax.training.step_kinds import StepKind

Value = TypeVar("Value")


class PhaseTimes:
    """Seconds of the phases of a step, such as rollout and update, for each kind of step.

    Dispatch is asynchronous, so the duration of a phase is known only if the host waits for its
    result. The host waits in one step of each kind between two entries of the metrics log, and
    never in the first step of a kind, which includes compilation.
    """

    def __init__(self) -> None:
        self._seen: set[StepKind] = set()
        self._timed: dict[StepKind, dict[str, float]] = {}
        self._phases: dict[str, float] | None = None

    def begin(self, kind: StepKind, state: Any) -> None:
        """Starts a step of some kind; waits for `state` if the step is to be timed."""
        self._phases = None
        if kind in self._seen and kind not in self._timed:
            self._phases = self._timed[kind] = {}
            jax.block_until_ready(state)
        self._seen.add(kind)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Callable[[Value], Value]]:
        """Times the `with` block.

        Yields a function to apply to the result of the phase. It returns the result unchanged, and
        in a timed step first waits until the arrays of the result are computed.
        """
        phases, start = self._phases, time.monotonic()

        def wait(value: Value) -> Value:
            return value if phases is None else jax.block_until_ready(value)

        with jax.profiler.TraceAnnotation(name):
            yield wait
        if phases is not None:
            phases[name] = phases.get(name, 0.0) + time.monotonic() - start

    def take(self) -> dict[StepKind, dict[str, float]]:
        """Returns the seconds measured since the last call, by kind of step and phase."""
        timed, self._timed, self._phases = self._timed, {}, None
        return timed


class Profiler:
    """Writes a trace of some steps, for TensorBoard's profiler or Perfetto."""

    def __init__(self, steps: tuple[int, int] | None, folder: str):
        """Creates the profiler.

        Args:
          steps: first and last step of the trace, counted from 1 like the steps of the metrics.
            None writes no trace.
          folder: folder in which the trace is written to `plugins/profile/`.
        """
        self._steps = steps
        self._folder = folder
        self._is_running = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Callable[[Any], None]]:
        """Traces the `with` block, if step `number` (counted from 1) is to be traced.

        Yields a function to call with the step's result. The trace of the last step ends only when
        this result is computed.
        """
        if self._steps is None:
            yield lambda result: None
            return
        first, last = self._steps
        if first <= number <= last and not self._is_running:
            jax.profiler.start_trace(self._folder)
            self._is_running = True
        results: list[Any] = []
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield results.append
        if number >= last and self._is_running:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the trace, if one is being written."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
