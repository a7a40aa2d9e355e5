"""One run laid out in many ways: is it the same run?

    PYTHONPATH=.:tests python tests/drills/equal.py --folder=/tmp/equal

Over one device, meshes of eight simulated ones, two and four processes, with layers as a loop and
with each policy of rematerialisation; for AdamW and Adafactor. Two runs a layout: on fixed outputs
(lambda 0) for five steps, and on the student's own (lambda 1). Prints a table of the largest
differences from one device, and fails where a limit is passed:

- the norm of the first gradient by 1e-5 of it, the loss of each step by 1e-5 of it;
- a parameter, after five steps, by 2% of steps times learning rate;
- sampled outputs of the initial student: equal, but for those that part at a near tie, which are
  counted: their tokens' probabilities differ by rounding, and a draw can fall between. The loss of
  the first step on samples by 2%, for such outputs.

What is done is kept in the folder, and the same command goes on.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import processes
import small_runs
import test_kill_and_resume as kills

NUM_STEPS = 5
LEARNING_RATE = 1e-3
MOST_OF_LOSS, MOST_OF_PARAMETERS = 1e-5, 0.02
# Of sampled outputs, at most so many may part at near ties.
MOST_TIES = 0.05
MOST_OF_SAMPLED_LOSS = 0.02
OPTIMIZERS = ("AdamW", "Adafactor")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run lies on processes and devices."""

    name: str
    processes: int = 1
    devices: int = 1
    settings: tuple[tuple[str, Any], ...] = ()


FSDP = ("PARTITIONING_RULES", "fsdp")
LAYOUTS = (
    Layout("one device"),
    Layout("8x1", devices=8),
    Layout("4x2", devices=8, settings=(("MODEL_PARALLELISM", 2),)),
    Layout("2x4", devices=8, settings=(("MODEL_PARALLELISM", 4),)),
    Layout("fsdp, 8", devices=8, settings=(FSDP,)),
    Layout("2 processes of 4", processes=2, devices=4),
    Layout("4 processes of 2", processes=4, devices=2),
    Layout("2 processes, 2x4, fsdp", 2, 4, (FSDP, ("MODEL_PARALLELISM", 4))),
    Layout("scanned layers", settings=(("SCAN_LAYERS", True),)),
    Layout("rematerialised, minimal", settings=(("REMAT_POLICY", "minimal"),)),
    Layout("rematerialised, full", settings=(("REMAT_POLICY", "full"),)),
    Layout("scanned, full, fsdp, 8", 1, 8, (FSDP, ("SCAN_LAYERS", True), ("REMAT_POLICY", "full"))),
)
SETTINGS: dict[str, Any] = {
    "INITIAL_CHECKPOINT_PATH": None,
    "TRAIN_STEPS": NUM_STEPS,
    "BATCH_SIZE": 16,
    "EVAL_BATCH_SIZE": 64,
    "EVAL_PERIOD": NUM_STEPS,
    "LEARNING_RATE": LEARNING_RATE,
    "WARMUP_STEPS": 1,
    "Experiment.log_period": 1,
    "recipes.arithmetic.num_heldout": 64,
    # To be split over four devices.
    "models.T5Config.vocab_size": 264,
    "student/models.T5Config.emb_dim": 32,
}
TEACHER = {
    "student/models.T5Config.emb_dim": 128,
    "student/models.T5Config.num_encoder_layers": 3,
    "student/models.T5Config.num_decoder_layers": 3,
    "student/models.T5Config.head_dim": 32,
    "student/models.T5Config.mlp_dim": 320,
    "TRAIN_STEPS": 2,
}


def bindings(settings: dict[str, Any]) -> list[str]:
    return [
        f"--gin.{name}={value if str(value).startswith('@') else repr(value)}"
        for name, value in settings.items()
    ]


def run(gin_file: str, model_dir: pathlib.Path, layout: Layout, settings: dict[str, Any]) -> None:
    """Runs what is missing of a run."""
    if (model_dir / "done").exists():
        return
    flags = [
        f"--gin_file=gin_configs/{gin_file}.gin",
        *bindings({"MODEL_DIR": str(model_dir), **settings, **dict(layout.settings)}),
    ]
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    started = []
    for index, own in enumerate(processes.group_flags(layout.processes)):
        with open(f"{model_dir}.{index}.log", "w") as log:
            started.append(
                processes.start([*flags, *own], devices=layout.devices, stdout=log, stderr=log)
            )
    statuses = [process.wait(600) for process in started]
    assert not any(statuses), f"{model_dir}: {statuses}; see {model_dir}.*.log"
    (model_dir / "done").touch()


def parameters(model_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """Of the last checkpoint, stacked layers one by one, by path."""
    tree = kills.all_arrays(model_dir / f"checkpoint_{NUM_STEPS}")["params"]
    found: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, array = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)
        head, stacked, tail = name.partition("layers/")
        layers = enumerate(array) if stacked else ()
        found |= {f"{head}layers_{number}/{tail}": layer for number, layer in layers}
        if not stacked:
            found[name] = array
    return found


def steps(model_dir: pathlib.Path) -> list[dict[str, Any]]:
    rows = small_runs.metrics(model_dir)
    return [row for row in rows if "train/data/loss" in row]


def first_of(model_dir: pathlib.Path, name: str) -> float:
    """The first value of a metric."""
    return next(row[name] for row in small_runs.metrics(model_dir) if name in row)


def outputs(model_dir: pathlib.Path) -> list[str]:
    """What the initial student sampled for the held-out prompts."""
    rows = small_runs.rows(model_dir / "eval" / "predictions_0.jsonl")
    return [row["prediction"] for row in rows]


def largest(pairs: Sequence[tuple[float, float]]) -> float:
    return max(abs(one - other) / abs(one) for one, other in pairs)


def compare(folder: pathlib.Path, optimizer: str, layout: Layout) -> str:
    """A row of the table; fails where a limit is passed."""
    base = folder / optimizer / LAYOUTS[0].name
    other = folder / optimizer / layout.name
    rows, others = steps(base / "lambda_0"), steps(other / "lambda_0")
    assert len(rows) == len(others) == NUM_STEPS
    name = "train/data/grad_norm"
    gradient = largest([(rows[0][name], others[0][name])])
    name = "train/data/loss"
    loss = largest([(row[name], its[name]) for row, its in zip(rows, others, strict=True)])
    before, after = parameters(base / "lambda_0"), parameters(other / "lambda_0")
    assert before.keys() == after.keys()
    moved = max(float(np.abs(before[key] - after[key]).max()) for key in before)
    moved /= NUM_STEPS * LEARNING_RATE
    # One output that parts at a near tie moves the mean of a batch.
    name, on_policy = "train/on_policy/loss", [path / "lambda_1" for path in (base, other)]
    sampled = largest([tuple(first_of(path, name) for path in on_policy)])
    texts, others_texts = outputs(base / "lambda_1"), outputs(other / "lambda_1")
    differ = sum(one != two for one, two in zip(texts, others_texts, strict=True))
    row = (
        f"| {optimizer} | {layout.name} | {gradient:.1e} | {loss:.1e} | {moved:.2%} "
        f"| {differ} of {len(texts)} | {sampled:.1e} |"
    )
    assert gradient <= MOST_OF_LOSS, row
    assert loss <= MOST_OF_LOSS, row
    assert moved <= MOST_OF_PARAMETERS, row
    assert sampled <= MOST_OF_SAMPLED_LOSS, row
    assert differ <= MOST_TIES * len(texts), row
    return row


def table(
    folder: pathlib.Path,
    layouts: Sequence[Layout] = LAYOUTS,
    optimizers: Sequence[str] = OPTIMIZERS,
) -> str:
    """Runs all that is missing; the table."""
    teacher = folder / "teacher"
    run("sft/arithmetic", teacher, LAYOUTS[0], SETTINGS | TEACHER)
    lines = [
        "| optimizer | layout | first gradient's norm | loss | parameters | sampled outputs that "
        "differ | first loss on samples |",
        "|---|---|---|---|---|---|---|",
    ]
    for optimizer in optimizers:
        for layout in layouts:
            for fraction in (0, 1):
                settings = SETTINGS | {
                    "TEACHER_CHECKPOINT_PATH": str(teacher),
                    "STUDENT_DATA_FRACTION": float(fraction),
                    "Experiment.optimizer": f"@optimizers.{optimizer}()",
                    "Evaluation.method": "@sampling.Sample()",
                }
                model_dir = folder / optimizer / layout.name / f"lambda_{fraction}"
                run("arithmetic", model_dir, layout, settings)
            lines.append(compare(folder, optimizer, layout))
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    print(table(parser.parse_args().folder.resolve()))
