"""Tiny runs for the tests of run modes: always the same shapes, so that each compiles once."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.recipes import arithmetic
from gkd_jax.data.vocabularies import ByteVocabulary
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.optimizers import AdamW, Constant
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment import Checkpoints, Evaluation, Experiment, Student
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives.divergences import GeneralizedJSD, NegativeLogLikelihood
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective
from gkd_jax.run_modes import train
from gkd_jax.sampling.methods import Sample

BATCH_SIZE = 4
NUM_HELDOUT = 10  # Not a multiple of the batch size: the last batch is completed by fillers.
TASK = arithmetic(num_train=400, num_heldout=NUM_HELDOUT, min_steps=1, max_steps=1)


def one_device() -> Partitioner:
    """A mesh of one of the simulated devices."""
    return Partitioner(data_parallelism=1, devices=(jax.devices()[0],))


def model(width: int = 16, *, dropout_rate: float = 0.0, **changes: Any) -> T5:
    """A T5 of one layer over bytes."""
    sizes: dict[str, Any] = dict(
        vocab_size=259, emb_dim=width, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
        head_dim=8, mlp_dim=2 * width, dtype="float32", dropout_rate=dropout_rate,
    )  # fmt: skip
    return T5(T5Config(**sizes | changes))


TEACHER_WIDTH = 24


def data(split: str = "train", **changes: Any) -> DatasetConfig:
    """One-step problems: prompts of up to 48 bytes, outputs of up to 24."""
    return dataclasses.replace(
        DatasetConfig(
            task=TASK,
            split=split,
            feature_lengths={"inputs": 48, "targets": 24},
            batch_size=BATCH_SIZE,
            vocabulary=ByteVocabulary(),
        ),
        **changes,
    )


def sft(model_dir: pathlib.Path, **changes: Any) -> Experiment:
    """Fine-tuning from scratch for 5 steps."""
    return dataclasses.replace(
        Experiment(
            student=Student(model()),
            objective=Objective(NegativeLogLikelihood()),
            outputs=OutputMix(0.0),
            train_data=data(),
            optimizer=AdamW(Constant(1e-2)),
            num_steps=5,
            model_dir=str(model_dir),
            partitioner=one_device(),
            log_period=5,
        ),
        **changes,
    )


def gkd(model_dir: pathlib.Path, teacher: pathlib.Path, **changes: Any) -> Experiment:
    """Everything at once: lambda 0.5, dropout, two microbatches, a sampled evaluation."""
    experiment = sft(
        model_dir,
        student=Student(model(dropout_rate=0.1)),
        objective=Objective(GeneralizedJSD(beta=0.5)),
        outputs=OutputMix(0.5),
        teacher=Teacher(model(TEACHER_WIDTH), str(teacher)),
        num_microbatches=2,
        num_steps=12,
        log_period=4,
        evaluation=Evaluation(data("validation"), period=6, method=Sample()),
        checkpoints=Checkpoints(period=5, keep=10),
    )
    return dataclasses.replace(experiment, **changes)


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


_TIMES = ("time", "seconds", "target_tokens_per_second")


def metrics(model_dir: pathlib.Path) -> list[dict[str, Any]]:
    """What a run wrote, without what depends on the time of day."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.rpartition("/")[2].startswith(_TIMES)
        }
        for row in rows(model_dir / "metrics.jsonl")
        if "plan" not in row
    ]


def assert_equal_bits(left: Any, right: Any) -> None:
    """Every leaf of two trees is the same, bit for bit."""
    left_leaves = jax.tree_util.tree_leaves_with_path(left)
    right_leaves = jax.tree_util.tree_leaves_with_path(right)
    assert [path for path, _ in left_leaves] == [path for path, _ in right_leaves]
    for (path, one), (_, other) in zip(left_leaves, right_leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype, path
        assert one.tobytes() == other.tobytes(), jax.tree_util.keystr(path)


class Stopped(BaseException):
    """Stands for whatever ends a process between two steps: no code of the run sees it."""


def stop_at(monkeypatch, wanted: int) -> None:
    """Ends the run just before update number `wanted`."""
    original = train.Trainer.step

    def step(self, state, batch, step):
        if step == wanted:
            raise Stopped
        return original(self, state, batch, step)

    monkeypatch.setattr(train.Trainer, "step", step)
