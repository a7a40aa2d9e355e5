"""What all benchmarks share: contestants that take turns, cores, memory, tables.

Contestants run in turns, in an order that changes, and are compared by medians: what else the
machine does then reaches them alike. `turns` does so for functions of one process, `race` for
processes.
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
    """What the turns of one contestant took.

    Attributes:
      wall: seconds of each turn.
      cpu: seconds of each turn that the process had a core, over all threads. On one thread it
        is the wall time without what other processes took.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    def seconds(self, num_threads: int) -> float:
        """Median of a turn: of CPU time on one thread, of wall time on several."""
        return statistics.median(self.cpu if num_threads == 1 else self.wall)


def turns(contestants: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, Times]:
    """Times functions in turns, after a first call of each, which compiles.

    Args:
      contestants: functions of no arguments, whose result is there when they return.
      repeats: turns of each.
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
    """A process of a race.

    Attributes:
      command: its arguments. It uses `step_on_request`, or speaks as that does.
      environment: variables to set, beside those that are there.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def race(
    racers: Mapping[str, Racer], *, num_threads: int, repeats: int, warm_up: int = 2
) -> dict[str, tuple[Times, float]]:
    """Lets processes make a step each in turns; all are there at once, and one works at a time.

    Args:
      racers: by name.
      num_threads: cores that each is kept to, and `OMP_NUM_THREADS`.
      repeats: steps of each that count.
      warm_up: steps of each before those.

    Returns:
      Times and peak megabytes of each that did not fail; what failed is said on stderr.
    """
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    running: dict[str, subprocess.Popen] = {}
    with contextlib.ExitStack() as stack:
        for name, racer in racers.items():
            running[name] = _start(racer, cores)
            stack.callback(_stop, running[name])
            # One after the other: loading and compiling are no part of the race.
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
    """The side of `race` in a process that makes steps: waits for a line, and answers with one.

    Used around a step: `wait()`, the step, `answer()`. For a trainer that calls back at the start
    and at the end of its steps.
    """

    def __init__(self) -> None:
        # What libraries print must not come between the answers.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start: tuple[float, float] | None = None

    def wait(self) -> bool:
        """Says that a step may be asked for, and waits for that; False when there is no more."""
        if self._start is None:
            self._write({})
        if not sys.stdin.readline():
            return False
        self._start = time.perf_counter(), time.process_time()
        return True

    def answer(self) -> None:
        """Reports the step that `wait` began."""
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
    """The most memory that this program has had, as Linux counts it (MB of 10^6 bytes)."""
    # Not ru_maxrss, which begins with that of the program that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return int(kilobytes) * 1024 / 1e6


def keep_to_cores(num_threads: int | None) -> int:
    """Keeps this process to so many cores, or to those it has; call it before JAX starts."""
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    os.sched_setaffinity(0, cores)
    return len(cores)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _orders(names: Iterable[str], repeats: int) -> Iterator[list[str]]:
    """The contestants in an order of its own for every repetition, always the same ones."""
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
    """Sends a request if there is one; the answer, or None where the process has ended."""
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
