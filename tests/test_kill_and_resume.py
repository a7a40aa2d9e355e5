"""A run that is killed at the worst moments ends as one that is not, bit for bit."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import processes
import pytest
import small_recipes
import small_runs

from gkd_jax.checkpoints import layout
from gkd_jax.objectives.mixing import OutputMix

NUM_STEPS = 24
SETTINGS = {
    "TRAIN_STEPS": NUM_STEPS,
    "STUDENT_DATA_FRACTION": 0.5,
    "DROPOUT_RATE": 0.1,
    "NUM_MICROBATCHES": 2,
    "CHECKPOINT_PERIOD": 3,
    "EVAL_PERIOD": 8,
    "Experiment.log_period": 1,
    # An untrained student seldom ends its outputs: a rollout takes longer than the step.
    "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 128},
}
MAX_STARTS = 12


class Process:
    """The command line in a process of its own, its lines read as they come."""

    def __init__(self, flags: list[str], cache: pathlib.Path):
        self._process = processes.start(
            flags, cache=cache, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        self.log: list[str] = []

    def lines(self) -> Iterator[str]:
        for line in self._process.stderr:
            self.log.append(line.rstrip("\n"))
            yield self.log[-1]

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self.log += self._process.communicate()[1].splitlines()
        assert self._process.returncode == -signal.SIGKILL, "\n".join(self.log)

    def finish(self) -> None:
        for _ in self.lines():
            pass
        assert self._process.wait() == 0, "\n".join(self.log)


def unfinished(model_dir: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints under way: begun, and without their manifest."""
    return [
        path.parent
        for path in model_dir.glob("checkpoint_*/UNFINISHED")
        if not (path.parent / "MANIFEST.json").exists()
    ]


def kill_in_a_save(process: Process, model_dir: pathlib.Path) -> bool:
    """Kills as soon as a save is under way; returns whether it was cut off."""
    before = unfinished(model_dir)
    while process.is_alive():
        if any(path not in before for path in unfinished(model_dir)):
            process.kill()
            return any(path not in before for path in unfinished(model_dir))
        time.sleep(0.0005)
    raise AssertionError("the run ended before it was killed")


def steps_made(model_dir: pathlib.Path) -> int:
    return max(row["step"] for row in small_runs.rows(model_dir / "metrics.jsonl"))


def kill_in_a_rollout(process: Process, model_dir: pathlib.Path) -> bool:
    """Kills in the middle of what an on-policy step takes longer than one on data.

    Returns whether the step that was cut off was on-policy.
    """
    seconds: dict[bool, float] = {}
    mix = OutputMix(SETTINGS["STUDENT_DATA_FRACTION"])
    for line in process.lines():
        match = re.search(rf"step (\d+)/{NUM_STEPS} .*? ([\d.]+) s/step", line)
        if not match:
            continue
        step = int(match[1])
        was_on_policy, is_next = (mix.is_on_policy(number, seed=0) for number in (step - 1, step))
        # The least of each kind: the first compiles.
        seconds[was_on_policy] = min(seconds.get(was_on_policy, 1e9), float(match[2]))
        is_plain = step % SETTINGS["EVAL_PERIOD"] and step % SETTINGS["CHECKPOINT_PERIOD"]
        if len(seconds) == 2 and is_next and is_plain:
            rollout_seconds = seconds[True] - seconds[False]
            assert rollout_seconds > 0
            time.sleep(0.4 * rollout_seconds)
            process.kill()
            return steps_made(model_dir) == step
    raise AssertionError("the run ended before it was killed")


def kill_after_an_evaluation(process: Process, model_dir: pathlib.Path) -> bool:
    """Kills when the scores of an evaluation have just been written."""
    for line in process.lines():
        if re.match(rf"step (?!0:|{NUM_STEPS}:)\d+: eval/", line):
            process.kill()
            return True
    raise AssertionError("the run ended before it was killed")


def all_arrays(folder: pathlib.Path) -> dict:
    """Every array of a checkpoint: parameters, optimizer's state, step."""
    nested: dict = {}
    for name, (shape, dtype) in layout.read_header(folder).shapes.items():
        node = nested
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, dtype)
    return layout.read_arrays(folder, nested)


Kill = Callable[[Process, pathlib.Path], bool]
KILLS: tuple[Kill, ...] = (kill_in_a_save, kill_in_a_rollout, kill_after_an_evaluation)


def check(recipe: small_recipes.Recipe, folder: pathlib.Path) -> None:
    whole, parts, cache = folder / "whole", folder / "parts", folder / "cache"
    Process(recipe.flags(whole, **SETTINGS), cache).finish()

    waiting = list(KILLS)
    starts = 0
    while waiting:
        starts += 1
        assert starts <= MAX_STARTS, f"{waiting[0].__name__} has not happened"
        process = Process(recipe.flags(parts, **SETTINGS), cache)
        if waiting[0](process, parts):
            waiting.pop(0)
    process = Process(recipe.flags(parts, **SETTINGS), cache)
    process.finish()
    assert any("resuming after step" in line for line in process.log)

    last = f"checkpoint_{NUM_STEPS}"
    small_runs.assert_equal_bits(all_arrays(parts / last), all_arrays(whole / last))
    assert small_runs.metrics(parts) == small_runs.metrics(whole)
    names = sorted(path.name for path in (whole / "eval").glob("predictions_*"))
    assert names == [f"predictions_{step}.jsonl" for step in (0, 16, 24, 8)]
    for name in names:
        assert (parts / "eval" / name).read_bytes() == (whole / "eval" / name).read_bytes()
    assert unfinished(parts) == []
    written = {name for row in small_runs.metrics(parts) for name in row}
    assert {"eval/bleu", "train/data/loss", "train/on_policy/loss"} <= written


@pytest.mark.slow
@pytest.mark.pitfall(43)
def test_killed_three_times(tmp_path):
    check(small_recipes.make_recipe_on_best("wmt_ende", tmp_path / "data"), tmp_path)
