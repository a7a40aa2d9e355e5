"""What a user can get wrong: one clear message that names setting and remedy, before any step."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
import small_recipes
import small_runs
from small_recipes import run_main

from gkd_jax import train
from gkd_jax.checkpoints.store import save_params
from gkd_jax.data.train_vocabulary import train_sentencepiece
from gkd_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary
from gkd_jax.experiment import Checkpoints, Evaluation
from gkd_jax.prepare import ConfigurationError
from gkd_jax.teachers import Teacher


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    return {name: small_recipes.make_recipe(name, folder / name) for name in _RECIPES}


_RECIPES = ("wmt_ende", "gsm8k", "flan2021")


@pytest.fixture(autouse=True)
def no_training_step(monkeypatch):
    """Whatever is refused here is refused before any training step."""

    def step(*args):
        raise AssertionError("a training step was made")

    monkeypatch.setattr(train.Trainer, "step", step)


def refused(arguments: list[str], *wanted: str) -> None:
    """The command ends with status 2 and one message that has all that is wanted."""
    status, out, err = run_main(*arguments)
    assert status == 2, err
    message = err[err.index("error: ") :]
    assert "Traceback" not in err
    for text in wanted:
        assert text in message, message
    assert out == ""


@pytest.fixture
def other_file(tmp_path):
    """Writes a file of the given text and returns its path."""

    def write(text: str | bytes, name: str = "file.txt") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


# Recipe, changed settings, and parts of the message: the setting, what came, the remedy.
_SETTINGS = {
    "misspelt binding": (
        "wmt_ende", {"OutputMix.student_data_fractoin": 0.5},
        ("student_data_fractoin", "Did you mean", "student_data_fraction"),
    ),
    "misspelt macro": ("wmt_ende", {"BETTA": 0.5}, ("BETTA", "Did you mean 'BETA'")),
    "unused macro": ("wmt_ende", {"MY_OWN": 1}, ("MY_OWN",)),
    "missing data file": (
        "wmt_ende", {"TRAIN_INPUTS": "/nowhere/train.en"},
        ("ParallelText.inputs_path", "'/nowhere/train.en'", "Correct the path"),
    ),
    "missing vocabulary file": (
        "wmt_ende", {"VOCABULARY_PATH": "/nowhere/spm.model"},
        ("SentencePieceVocabulary.path", "'/nowhere/spm.model'"),
    ),
    "missing teacher": (
        "wmt_ende", {"TEACHER_CHECKPOINT_PATH": "/nowhere/teacher"},
        ("Teacher.checkpoint", "/nowhere/teacher", "does not exist"),
    ),
    "missing initial checkpoint": (
        "wmt_ende", {"INITIAL_CHECKPOINT_PATH": "/nowhere/student"},
        ("Student.initial_checkpoint", "/nowhere/student", "does not exist"),
    ),
    "student of another shape": (
        "wmt_ende", {"STUDENT_DIM": 32},
        ("Student.initial_checkpoint", "does not fit", "[100, 16], wanted [100, 32]", "Set the"),
    ),
    "teacher of another shape": (
        "wmt_ende", {"TEACHER_LAYERS": 2},
        ("Teacher.checkpoint", "does not fit", "layers_1", "is missing", "Set the"),
    ),
    "more pieces than the output layer": (
        "wmt_ende", {"VOCAB_SIZE": 50},
        ("vocab_size", "50 and 100", "to 100 or more"),
    ),
    "batch and mesh": (
        "wmt_ende", {"Partitioner.data_parallelism": 8, "BATCH_SIZE": 12},
        ("batch_size must be divisible by", "12 and 8", "multiple of 8"),
    ),
    "batch and microbatches": (
        "wmt_ende", {"NUM_MICROBATCHES": 3},
        ("batch_size must be divisible by", "4 and 1 * 3", "multiple of 3"),
    ),
    "beta above 1": (
        "wmt_ende", {"BETA": 1.5}, ("GeneralizedJSD.beta", "1.5", "ReverseKL"),
    ),
    "beta of 0": ("wmt_ende", {"BETA": 0.0}, ("GeneralizedJSD.beta", "0.0", "ForwardKL")),
    "lambda above 1": (
        "wmt_ende", {"STUDENT_DATA_FRACTION": 1.5},
        ("OutputMix.student_data_fraction (lambda)", "1.5", "inside that range"),
    ),
    "lambda below 0": (
        "wmt_ende", {"STUDENT_DATA_FRACTION": -0.1},
        ("OutputMix.student_data_fraction (lambda)", "-0.1", "inside that range"),
    ),
    "sampling at temperature 0": (
        "wmt_ende", {"SAMPLING_TEMPERATURE": 0.0},
        ("Sample.temperature must be above 0", "Greedy()"),
    ),
    "teacher's temperature 0": (
        "wmt_ende", {"TEACHER_TEMPERATURE": 0.0},
        ("Objective.teacher_temperature", "above 0"),
    ),
    "student's temperature 0": (
        "wmt_ende", {"STUDENT_TEMPERATURE": 0.0},
        ("Objective.student_temperature", "above 0"),
    ),
    "lengths that leave nothing": (
        "wmt_ende", {"TASK_FEATURE_LENGTHS": {"inputs": 1, "targets": 16}},
        ("feature_lengths['inputs']", "at least 2", "Set it"),
    ),
    "lengths that cut all to one text": (
        "wmt_ende", {"TASK_FEATURE_LENGTHS": {"inputs": 4, "targets": 16}},
        ("feature_lengths['inputs'] = 4", "cuts every prompt", "Set it higher"),
    ),
    "unknown split": ("wmt_ende", {"EVAL_SPLIT": "dev"}, ("'dev'", "'validation'")),
    "cross-entropy on samples": (
        "wmt_ende", {"DIVERGENCE": None, "Objective.divergence": "@NegativeLogLikelihood()"},
        ("student_data_fraction to 0",),
    ),
    "more data than there is": (
        "wmt_ende", {"DatasetConfig.num_examples": 1000}, ("num_examples is 1000", "at most 64"),
    ),
    "missing field": (
        "gsm8k", {"gsm8k.question_field": "problem"}, ("'problem'", "'question', 'answer'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _SETTINGS)
def test_wrong_settings(case, recipes, tmp_path):
    name, changes, wanted = _SETTINGS[case]
    arguments = recipes[name].flags(tmp_path / "run", **changes)
    if "Objective.divergence" in changes:
        arguments[-1] = "--gin.Objective.divergence=@divergences.NegativeLogLikelihood()"
        arguments = [argument for argument in arguments if "BETA" not in argument]
        arguments.append("--gin.DIVERGENCE=@divergences.NegativeLogLikelihood()")
        arguments.pop(-2)
    refused(arguments, *wanted)
    # Nothing is left behind: the corrected command is not another configuration.
    assert not (tmp_path / "run").exists()
