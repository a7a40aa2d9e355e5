"""Where a run's time goes: seconds of the parts of a step, and traces for a profiler."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

Value = TypeVar("Value")


class PhaseTimes:
    """Seconds of the parts of a step, by where its outputs came from.

    Parts run on the devices one after another while the host runs ahead; to time one, the host
    waits for it. That is done on one step of each kind between two lines of metrics, and never on
    the first of a kind, which compiles.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._timed: dict[str, dict[str, float]] = {}
        self._phases: dict[str, float] | None = None

    def begin(self, kind: str, state: Any) -> None:
        """Starts a step of a kind; waits for `state` if it is one to be timed."""
        self._phases = None
        if kind in self._seen and kind not in self._timed:
            self._phases = self._timed[kind] = {}
            jax.block_until_ready(state)
        self._seen.add(kind)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Callable[[Value], Value]]:
        """Times what is within, until the value given to what it yields is there."""
        phases, start = self._phases, time.monotonic()

        def wait(value: Value) -> Value:
            return value if phases is None else jax.block_until_ready(value)

        with jax.profiler.TraceAnnotation(name):
            yield wait
        if phases is not None:
            phases[name] = phases.get(name, 0.0) + time.monotonic() - start

    def take(self) -> dict[str, dict[str, float]]:
        """The seconds since the last call: of each kind, those of each part of one step."""
        timed, self._timed, self._phases = self._timed, {}, None
        return timed


class Profiler:
    """Writes a trace of some steps, which TensorBoard's profiler and Perfetto read."""

    def __init__(self, steps: tuple[int, int] | None, folder: str):
        """Makes one.

        Args:
          steps: first and last step of the trace, as `train/...` metrics count them; None for none.
          folder: where it goes, `plugins/profile/...` below it.
        """
        self._steps = steps
        self._folder = folder
        self._is_running = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Callable[[Any], None]]:
        """Surrounds step `number`, counted from 1; what it yields is told the step's result."""
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
        """Ends a trace that is still being written."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
