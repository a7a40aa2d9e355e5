"""Kills small runs at random moments, and shows that each ends as one that nobody disturbed.

    PYTHONPATH=.:tests python tests/drills/drill.py --kills=200 --folder=/tmp/drill

Runs are of two processes that share a mesh, half of their steps on policy. They are killed while
they save, restore, sample, evaluate, and at any moment; by SIGKILL and SIGTERM; both processes or
one, after which the other is ended as a launcher does. A killed run is started again and killed
again, and after some kills is let go on to its end: every array of its last checkpoint, its metrics
and its predictions must then be those of the undisturbed run, bit for bit. After every kill the
newest checkpoint must be the one that was due. The command may be stopped at any time: the same
command goes on from `kills.jsonl` in the folder.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import processes
import small_runs
import test_kill_and_resume as kills

from gkd_jax.checkpoints import layout
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.training import interruption

NUM_STEPS, SAVE_PERIOD, EVAL_PERIOD = 30, 3, 10
LAMBDA = 0.5
SETTINGS: dict[str, Any] = {
    "INITIAL_CHECKPOINT_PATH": None,
    "TRAIN_STEPS": NUM_STEPS,
    "STUDENT_DATA_FRACTION": LAMBDA,
    "DROPOUT_RATE": 0.1,
    "BATCH_SIZE": 16,
    "EVAL_BATCH_SIZE": 16,
    "NUM_MICROBATCHES": 2,
    "CHECKPOINT_PERIOD": SAVE_PERIOD,
    "EVAL_PERIOD": EVAL_PERIOD,
    "Experiment.log_period": 1,
    "Evaluation.num_divergence_examples": 0,
    "recipes.arithmetic.num_heldout": 40,
}
# One layer each: most of a start is compilation.
SIZES = {"emb_dim": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}
SIZES_OF_TEACHER = SIZES | {"num_heads": 4, "head_dim": 16, "mlp_dim": 128}
MOMENTS = ("save", "restore", "rollout", "evaluation", "any")
# Whom a signal is sent to, of two processes.
VICTIMS = ((0, 1), (0,), (1,))
# Of a run that is killed before it saves, again and again.
MOST_KILLS_OF_A_RUN = 12
SECONDS_TO_END = 900.0


def bindings(settings: dict[str, Any], scope: str = "") -> list[str]:
    return [f"--gin.{scope}{name}={value!r}" for name, value in settings.items()]


def make_teacher(model_dir: pathlib.Path) -> None:
    """A run of two steps of fine-tuning."""
    flags = [
        "--gin_file=gin_configs/sft/arithmetic.gin",
        *bindings({"MODEL_DIR": str(model_dir), "TRAIN_STEPS": 2, "WARMUP_STEPS": 1}),
        *bindings({"recipes.arithmetic.num_heldout": 40, "Evaluation.num_divergence_examples": 0}),
        *bindings(SIZES, "student/models.T5Config."),
    ]
    process = processes.start(flags, devices=2, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.communicate()[0]
    assert process.returncode == 0, output


class Group:
    """Two processes of one run, the lines of both as they come."""

    def __init__(self, model_dir: pathlib.Path, cache: pathlib.Path):
        """Starts them.

        Args:
          model_dir: of the run; beside it is the teacher's.
          cache: of what was compiled.
        """
        self.model_dir = model_dir
        # Of processes that were killed before.
        self._unfinished = set(kills.unfinished(model_dir))
        self.start_time = time.monotonic()
        flags = [
            "--gin_file=gin_configs/arithmetic.gin",
            f"--gin.MODEL_DIR={str(model_dir)!r}",
            f"--gin.TEACHER_CHECKPOINT_PATH={str(model_dir.parent / 'teacher')!r}",
            *bindings(SETTINGS),
            *bindings(SIZES, "student/models.T5Config."),
            *bindings(SIZES_OF_TEACHER, "teacher/models.T5Config."),
        ]
        self.lines: list[str] = []
        self._processes = [
            processes.start(
                [*flags, *own], devices=2, cache=cache,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
            for own in processes.group_flags(2)
        ]  # fmt: skip
        self._others: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(process, lines), daemon=True)
            for process, lines in zip(self._processes, (self.lines, self._others), strict=True)
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _read(process: subprocess.Popen, lines: list[str]) -> None:
        for line in process.stderr:
            lines.append(line.rstrip("\n"))

    def is_running(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def wait_until(self, condition: Callable[[], Any], seconds: float = SECONDS_TO_END) -> bool:
        """Waits for a condition; False if the run ended before it held."""
        end = time.monotonic() + seconds
        while self.is_running():
            if condition():
                return True
            assert time.monotonic() < end, self.tell("the run hangs")
            time.sleep(0.001)
        return False

    def saves(self) -> bool:
        """Whether a checkpoint is being written."""
        return bool(set(kills.unfinished(self.model_dir)) - self._unfinished)

    def line(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in list(self.lines))

    def step(self) -> int:
        """Of the last line of metrics."""
        found = [re.match(rf"step (\d+)/{NUM_STEPS} ", line) for line in list(self.lines)]
        return max((int(match[1]) for match in found if match), default=0)

    def send(self, number: signal.Signals, victims: tuple[int, ...]) -> None:
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[victim].pid, number)

    def end(self, victims: tuple[int, ...]) -> list[int]:
        """Waits for the victims, then ends what is left as a launcher would; the statuses."""
        for victim in victims:
            self._processes[victim].wait(SECONDS_TO_END)
        told = {self._processes[victim].returncode for victim in victims}
        # Told by SIGTERM, all processes save together.
        patience = SECONDS_TO_END if told <= {0, interruption.EXIT_STATUS} else 1.0
        for process in self._processes:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()
        return [process.returncode for process in self._processes]

    def has_not_met(self) -> bool:
        """Whether the processes ended since, on a busy machine, one came too late for JAX."""
        return any(
            "Gloo context initialization failed" in line for line in self.lines + self._others
        )

    def tell(self, what: str) -> str:
        return "\n".join([what, *self.lines[-40:], "--- the other process", *self._others[-40:]])


def newest(model_dir: pathlib.Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    found = model_dir.glob("checkpoint_*/MANIFEST.json")
    return max((int(path.parent.name.rpartition("_")[2]) for path in found), default=0)


def wait_for(moment: str, group: Group, draw: random.Random, seconds: float) -> bool:
    """Waits for a moment of a kind; False if the run ended before.

    Args:
      moment: one of `MOMENTS`.
      group: the run.
      draw: what is random about the moment.
      seconds: how long a start of such a run takes.
    """
    if moment == "any":
        delay = draw.uniform(0.0, seconds)
        return group.wait_until(lambda: time.monotonic() - group.start_time > delay)
    if moment == "save":
        found = group.wait_until(group.saves)
        delay = draw.uniform(0.0, 0.03)
    elif moment == "restore":
        found = group.wait_until(lambda: group.line("teacher: parameters from"))
        delay = draw.uniform(0.0, 0.6)
    elif moment == "rollout":
        mix, first = OutputMix(LAMBDA), group.step() + draw.randint(1, 6)
        found = group.wait_until(
            lambda: (step := group.step()) >= first and mix.is_on_policy(step, seed=0)
        )
        delay = draw.uniform(0.0, 0.1)
    else:
        found = group.wait_until(lambda: (step := group.step()) and step % EVAL_PERIOD == 0)
        delay = draw.uniform(0.0, 0.3)
    time.sleep(delay)
    return found and group.is_running()


def doing(group: Group) -> str:
    """What a run was doing, by what it has written."""
    step = group.step()
    if group.saves():
        return "save"
    if step == 0:
        restores = group.line("teacher: parameters from") and newest(group.model_dir)
        if group.line("resuming after"):
            return "first step"
        return "restore" if restores else "start"
    if step % EVAL_PERIOD == 0 and not group.line(rf"step {step}: eval/"):
        return "evaluation"
    return "rollout" if OutputMix(LAMBDA).is_on_policy(step, seed=0) else "step on data"


def kill(number: int, model_dir: pathlib.Path, cache: pathlib.Path, seconds: float) -> dict | None:
    """Starts the run and kills it; what happened, or None if it came to its end."""
    # Of the run too: where one ended before its moment came, the next has another.
    draw = random.Random(f"{number} {model_dir.name}")
    moment = MOMENTS[number % len(MOMENTS)]
    name = draw.choice(("SIGKILL", "SIGKILL", "SIGTERM"))
    victims = draw.choice(VICTIMS)
    before = newest(model_dir)
    group = Group(model_dir, cache)
    if not wait_for(moment, group, draw, seconds):
        statuses = group.end((0, 1))
        if group.has_not_met():
            return {"not_met": number, "run": model_dir.name}
        assert statuses == [0, 0], group.tell(f"ended by itself with {statuses}")
        return None
    while_doing, step = doing(group), group.step()
    group.send(signal.Signals[name], victims)
    statuses = group.end(victims)
    after = newest(model_dir)
    told = f"kill {number}: {name} of {victims}, {while_doing} at step {step}: {statuses}"
    # What was saved stays; of two saves the first is complete before the second begins.
    due = step // SAVE_PERIOD * SAVE_PERIOD - SAVE_PERIOD
    assert after >= max(before, due), group.tell(f"{told}: newest {after}, was {before}")
    if interruption.EXIT_STATUS in statuses:
        assert set(statuses) == {interruption.EXIT_STATUS}, group.tell(told)
        (stopped,) = (
            int(match[1])
            for line in group.lines
            if (match := re.match(r"error: stopped by SIGTERM after step (\d+)", line))
        )
        assert after == stopped >= step, group.tell(f"{told}: newest {after}, stopped at {stopped}")
    return {
        "kill": number, "run": model_dir.name, "signal": name, "victims": list(victims),
        "moment": moment, "doing": while_doing, "step": step, "statuses": statuses,
        "newest_before": before, "newest_after": after,
    }  # fmt: skip


def finish(model_dir: pathlib.Path, cache: pathlib.Path) -> float:
    """Runs to the end; how long it took."""
    group = Group(model_dir, cache)
    statuses = group.end((0, 1))
    if group.has_not_met():
        return finish(model_dir, cache)
    assert statuses == [0, 0], group.tell(f"ended with {statuses}")
    return time.monotonic() - group.start_time


def host_part(folder: pathlib.Path) -> dict:
    """What a checkpoint keeps besides arrays, without what depends on the time of day."""
    host = json.loads((folder / "host.json").read_text())["host"]
    if host["owes_evaluation"]:
        # Of a run that was stopped at its last step, and evaluated when it went on.
        step = int(folder.name.rpartition("_")[2])
        host |= {"owes_evaluation": False, "scores": layout.read_evaluated(folder.parent, step)}
    host.pop("seconds")
    host["scores"].pop("seconds")
    return host


def compare(model_dir: pathlib.Path, whole: pathlib.Path) -> None:
    """Fails unless a run ended as the undisturbed one."""
    last = f"checkpoint_{NUM_STEPS}"
    small_runs.assert_equal_bits(kills.all_arrays(model_dir / last), kills.all_arrays(whole / last))
    assert host_part(model_dir / last) == host_part(whole / last)
    assert small_runs.metrics(model_dir) == small_runs.metrics(whole)
    names = sorted(path.name for path in (whole / "eval").glob("predictions_*"))
    assert len(names) == NUM_STEPS // EVAL_PERIOD + 1
    for name in names:
        assert (model_dir / "eval" / name).read_bytes() == (whole / "eval" / name).read_bytes()
    assert kills.unfinished(model_dir) == []


def read(path: pathlib.Path) -> Iterator[dict]:
    """The lines of a file; one that was cut off ends it."""
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def drill(folder: pathlib.Path, num_kills: int) -> list[dict]:
    """Kills until there were so many, and lets every run come to its end; all that happened."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, cache, log = folder / "whole", folder / "cache", folder / "kills.jsonl"
    if not newest(folder / "teacher"):
        make_teacher(folder / "teacher")
    if newest(whole) < NUM_STEPS:
        finish(whole, cache)  # Compiles.
        # The same numbers again, and how long a start takes that need not compile.
        seconds = finish(folder / "again", cache)
        compare(folder / "again", whole)
        (folder / "seconds").write_text(str(seconds))
    seconds = float((folder / "seconds").read_text())
    done = list(read(log))
    with log.open("a") as file:

        def note(row: dict) -> None:
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        while True:
            killed = [row for row in done if "kill" in row]
            ended = [row for row in done if "ended" in row]
            run = folder / f"run_{len(ended)}"
            of_run = [row for row in killed if row["run"] == run.name]
            enough = len(killed) >= num_kills
            if enough and not of_run:
                return done
            number = killed[-1]["kill"] + 1 if killed else 0
            row = None
            if not enough and len(of_run) < MOST_KILLS_OF_A_RUN:
                row = kill(number, run, cache, seconds)
            else:
                finish(run, cache)
            if row is None:
                compare(run, whole)
                row = {"ended": run.name, "kills": len(of_run)}
            note(row)
            print(json.dumps(row), flush=True)


def summary(done: list[dict]) -> str:
    """How many kills of which kind there were."""
    killed = [row for row in done if "kill" in row]
    lines = [f"{len(killed)} kills, {sum('ended' in row for row in done)} runs ended, all equal"]
    for name in ("signal", "victims", "doing"):
        counts = collections.Counter(str(row[name]) for row in killed)
        lines.append(f"{name}: " + ", ".join(f"{key} {n}" for key, n in counts.most_common()))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    print(summary(drill(arguments.folder.resolve(), arguments.kills)))
