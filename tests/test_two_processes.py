"""A whole run over two processes: the same data, numbers and files as in one."""

import pathlib
import subprocess
from typing import Any

import processes
import pytest
import small_recipes
import small_runs

SETTINGS = {
    "TRAIN_STEPS": 6,
    "STUDENT_DATA_FRACTION": 0.5,
    "DROPOUT_RATE": 0.0,
    "BATCH_SIZE": 8,
    "NUM_MICROBATCHES": 2,
    "EVAL_PERIOD": 3,
    "CHECKPOINT_PERIOD": 3,
    "Experiment.log_period": 1,
    "Partitioner.data_parallelism": 2,
    "Partitioner.model_parallelism": 2,
}


def start(flags: list[str], *, devices: int, **options: Any) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return processes.start(flags, devices=devices, **pipes, **options)


def finish(started: list[subprocess.Popen]) -> None:
    outputs = [process.communicate(timeout=560)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs


def together(flags: list[str], **options: Any) -> list[subprocess.Popen]:
    return [start([*flags, *own], devices=2, **options) for own in processes.group_flags(2)]


@pytest.mark.slow
def test_replay_over_two_processes(tmp_path):
    """What is drawn is the same; a checkpoint of two processes is gone on with by one."""
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "data")
    settings = SETTINGS | {"STUDENT_DATA_FRACTION": 1.0, "REPLAY_CAPACITY": 16, "EVAL_PERIOD": 100}
    settings["FallingRefresh.num_steps"] = 6  # Of the whole training, in each of its parts.

    def flags(model_dir: pathlib.Path, **changes: object) -> list[str]:
        method = "--gin_file=gin_configs/methods/distillm.gin"
        given = recipe.flags(model_dir, **settings | changes)
        last = max(i for i, flag in enumerate(given) if flag.startswith("--gin_file"))
        return [*given[: last + 1], method, *given[last + 1 :]]

    one, two = tmp_path / "one", tmp_path / "two"
    finish([start(flags(one), devices=4)])
    finish(together(flags(two, TRAIN_STEPS=3)))
    finish([start(flags(two), devices=4)])
    left, right = (
        [row for row in small_runs.metrics(folder) if "train/learning_rate" in row]
        for folder in (one, two)
    )
    assert [row["step"] for row in left] == list(range(1, 7))
    assert any("train/replay/staleness" in row for row in left[3:])
    for row, other in zip(left, right, strict=True):
        assert set(row) == set(other)
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=1e-4), (row["step"], name)


@pytest.mark.slow
def test_rewards_over_two_processes(tmp_path):
    """Each scores the texts of its own rows; the numbers are those of one process."""
    recipe = small_recipes.make_recipe("xsum", tmp_path / "data")
    settings = SETTINGS | {"STUDENT_DATA_FRACTION": 1.0, "EVAL_PERIOD": 100, "TRAIN_STEPS": 3}

    def flags(model_dir: pathlib.Path) -> list[str]:
        given = recipe.flags(model_dir, **settings)
        last = max(i for i, flag in enumerate(given) if flag.startswith("--gin_file"))
        return [*given[: last + 1], "--gin_file=examples/entailment_reward.gin", *given[last + 1 :]]

    one, two = tmp_path / "one", tmp_path / "two"
    finish([start(flags(one), devices=4)])
    finish(together(flags(two)))
    left, right = (
        [row for row in small_runs.metrics(folder) if "train/learning_rate" in row]
        for folder in (one, two)
    )
    assert [row["step"] for row in left] == [1, 2, 3]
    for row, other in zip(left, right, strict=True):
        assert set(row) == set(other)
        assert "train/reward/group_std" in row
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=1e-4), (row["step"], name)


def predictions(model_dir: pathlib.Path, step: int) -> str:
    return (model_dir / "eval" / f"predictions_{step}.jsonl").read_text()


@pytest.mark.slow
def test_a_run_over_two_processes(tmp_path):
    """Trains, evaluates, saves; goes on in another start; generates."""
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "data")
    one, two = tmp_path / "one", tmp_path / "two"
    finish([start(recipe.flags(one, **SETTINGS), devices=4)])
    finish(together(recipe.flags(two, **SETTINGS | {"TRAIN_STEPS": 3})))
    finish(together(recipe.flags(two, **SETTINGS)))

    left, right = (small_runs.metrics(folder) for folder in (one, two))
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for row, other in zip(left, right, strict=True):
        assert set(row) == set(other)
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=1e-4), (row["step"], name)
    for step in (0, 3, 6):
        assert predictions(one, step) == predictions(two, step)

    for folder, run in ((one, lambda flags: [start(flags, devices=4)]), (two, together)):
        output = str(tmp_path / f"{folder.name}.jsonl")
        generation = [
            "--gin_file=gin_configs/generate.gin",
            "--run_mode=generate",
            f"--gin.GENERATION_OUTPUT={output!r}",
            "--gin.GENERATION_SPLIT='validation'",
        ]
        finish(run([*recipe.flags(folder, **SETTINGS), *generation]))
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()


FAILS_ALONE = """
import sys
from absl import app
from gkd_jax import main
from gkd_jax.training import trainer

original = trainer.Trainer._update

def update(self, state, batch, step, *arguments):
    if step == 3 and sys.argv[-1] == "--process_index=1":
        raise RuntimeError("the judge does not answer")
    return original(self, state, batch, step, *arguments)

trainer.Trainer._update = update
main.run()
"""


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_and_so_do_the_others(tmp_path):
    """After a save, whose end the processes otherwise wait for together."""
    flags = [
        "--gin_file=gin_configs/sft/arithmetic.gin",
        f"--gin.MODEL_DIR={str(tmp_path / 'run')!r}",
        "--gin.TRAIN_STEPS=200", "--gin.CHECKPOINT_PERIOD=2", "--gin.BATCH_SIZE=8",
        "--gin.Experiment.evaluation=None", "--heartbeat_timeout_s=10",
    ]  # fmt: skip
    started = together(flags, program=["-c", FAILS_ALONE])
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert started[1].returncode == 1, outputs[1]
    assert "the judge does not answer" in outputs[1]
    assert started[0].returncode not in (0, 75), outputs[0]
    assert (tmp_path / "run" / "checkpoint_2" / "MANIFEST.json").exists()
