"""Timing that all benchmarks share: interleaved measurements, cores, memory, tables.

The candidates of a comparison run in turns, in a shuffled order, and are compared by medians, so
that other load on the machine affects all of them alike. `turns` compares functions within one
process, `race` compares processes.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of one candidate.

    Attributes:
      wall: wall time of each turn in seconds.
      cpu: CPU time of each turn in seconds, summed over threads. On one thread it is the wall
        time without the time taken by other processes.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    def seconds(self, num_threads: int) -> float:
        """Returns the median time of a turn: CPU time on one thread, wall time on several."""
        return statistics.median(self.cpu if num_threads == 1 else self.wall)


def turns(contestants: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, Times]:
    """Times functions in turns, after one call of each for compilation.

    Args:
      contestants: functions without arguments that block until their result is ready.
      repeats: number of turns of each.
    """
    for function in contestants.values():
        function()
    taken = {name: ([], []) for name in contestants}
    for names in _orders(contestants, repeats):
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            contestants[name]()
            taken[name][0].append(time.perf_counter() - wall)
            taken[name][1].append(time.process_time() - cpu)
    return {name: Times(tuple(wall), tuple(cpu)) for name, (wall, cpu) in taken.items()}


@dataclasses.dataclass(frozen=True)
class Racer:
    """A process that takes part in a race.

    Attributes:
      command: command line. The program uses `StepsOnRequest`, or its protocol.
      environment: environment variables, in addition to the current ones.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def race(
    racers: Mapping[str, Racer], *, num_threads: int, repeats: int, warm_up: int = 2
) -> dict[str, tuple[Times, float]]:
    """Makes processes run single steps in turns; all stay alive, and one works at a time.

    Args:
      racers: processes by name.
      num_threads: number of cores of each process, and its `OMP_NUM_THREADS`.
      repeats: number of timed steps of each.
      warm_up: number of untimed steps of each before those.

    Returns:
      Times and peak memory (MB) of each process that started; failures are printed to stderr.

    Raises:
      RuntimeError: a process ended during the race.
    """
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    running: dict[str, subprocess.Popen] = {}
    with contextlib.ExitStack() as stack:
        for name, racer in racers.items():
            running[name] = _start(racer, cores)
            stack.callback(_stop, running[name])
            # One after the other: loading and compilation are not timed.
            if _ask(running[name], None) is None:
                print(f"{name}: did not start: {' '.join(racer.command)}", file=sys.stderr)
                del running[name]
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in running}
        for names in _orders(running, warm_up + repeats):
            for name in names:
                answer = _ask(running[name], "step")
                if answer is None:
                    raise RuntimeError(f"{name} ended in the race; its own error is above.")
                answers[name].append(answer)
    return {
        name: (
            Times(
                tuple(answer["wall"] for answer in all_of[warm_up:]),
                tuple(answer["cpu"] for answer in all_of[warm_up:]),
            ),
            all_of[-1]["peak_mb"],
        )
        for name, all_of in answers.items()
    }


class StepsOnRequest:
    """Runs steps when `race` requests them: reads a line per request, writes a line per answer.

    Call `wait()`, run the step, call `answer()`; or call them from a trainer's callbacks at the
    start and at the end of a step.
    """

    def __init__(self) -> None:
        # Output of libraries must not mix with the answers.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start: tuple[float, float] | None = None

    def wait(self) -> bool:
        """Waits until a step is requested. Returns False if there are no more requests."""
        if self._start is None:
            self._write({})
        if not sys.stdin.readline():
            return False
        self._start = time.perf_counter(), time.process_time()
        return True

    def answer(self) -> None:
        """Reports the times of the step that started after `wait`."""
        assert self._start is not None
        wall, cpu = self._start
        self._write(
            {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
                "peak_mb": peak_megabytes(),
            }
        )

    def _write(self, answer: dict[str, float]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def peak_megabytes() -> float:
    """Returns the peak resident memory of this process on Linux, in MB of 10^6 bytes."""
    # Not ru_maxrss, which starts at the value of the parent process.
    status = pathlib.Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return int(kilobytes) * 1024 / 1e6


def keep_to_cores(num_threads: int | None) -> int:
    """Restricts this process to a number of cores and returns it. Call it before JAX starts."""
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    os.sched_setaffinity(0, cores)
    return len(cores)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Formats a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _orders(names: Iterable[str], repeats: int) -> Iterator[list[str]]:
    """Yields a shuffled order of the names for each repetition, from a fixed seed."""
    generator = random.Random(0)
    for _ in range(repeats):
        order = list(names)
        generator.shuffle(order)
        yield order


def _start(racer: Racer, cores: Sequence[int]) -> subprocess.Popen:
    environment = {
        **os.environ,
        **racer.environment,
        "OMP_NUM_THREADS": str(len(cores)),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks"))),
    }
    return subprocess.Popen(
        ["taskset", "--cpu-list", ",".join(map(str, cores)), *racer.command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _ask(process: subprocess.Popen, request: str | None) -> dict[str, float] | None:
    """Sends a request, if given, and returns the answer, or None if the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    if request is not None:
        print(request, file=process.stdin, flush=True)
    line = process.stdout.readline()
    return json.loads(line) if line else None


def _stop(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
