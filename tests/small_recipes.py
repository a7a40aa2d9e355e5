"""The recipes' gin files on tiny models and tiny files, run by the command line's own function."""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest import mock

import jax
from absl import flags
from absl.testing import flagsaver

from gkd_jax import main
from gkd_jax.checkpoints.save import save_params
from gkd_jax.common.array_types import Params
from gkd_jax.data.train_vocabulary import train_sentencepiece
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config

ROOT = pathlib.Path(__file__).parent.parent

_NOUNS = {"man": "mann", "dog": "hund", "bird": "vogel", "boy": "junge", "baker": "baecker"}
_VERBS = {"sees": "sieht", "hears": "hoert", "finds": "findet", "likes": "mag"}


def translations(number: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences of four or five words and their word-by-word translations."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(number):
        one, other = draw.choice(list(_NOUNS)), draw.choice(list(_NOUNS))
        verb = draw.choice(list(_VERBS))
        pairs.append(
            (
                f"the {one} {verb} the {other}",
                f"der {_NOUNS[one]} {_VERBS[verb]} den {_NOUNS[other]}",
            )
        )
    return pairs


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def _wmt_files(folder: pathlib.Path) -> dict[str, str]:
    files = {}
    for name, number, seed in (("TRAIN", 64, 0), ("VALIDATION", 10, 1)):
        pairs = translations(number, seed=seed)
        for side, column in (("INPUTS", 0), ("TARGETS", 1)):
            path = folder / f"{name.lower()}.{side.lower()}"
            files[f"{name}_{side}"] = write_lines(path, (pair[column] for pair in pairs))
    return files


def _xsum_files(folder: pathlib.Path) -> dict[str, str]:
    def lines(number: int, seed: int) -> Iterable[str]:
        pairs = translations(3 * number, seed=seed)
        for index in range(number):
            document = ". ".join(pair[0] for pair in pairs[3 * index : 3 * index + 3])
            yield json.dumps({"document": document, "summary": pairs[3 * index][1], "id": index})

    return {
        "TRAIN_PATH": write_lines(folder / "train.jsonl", lines(40, 0)),
        "VALIDATION_PATH": write_lines(folder / "validation.jsonl", lines(10, 1)),
    }


def _gsm8k_files(folder: pathlib.Path) -> dict[str, str]:
    def lines(number: int, seed: int) -> Iterable[str]:
        draw = random.Random(seed)
        for _ in range(number):
            a, b = draw.randrange(2, 20), draw.randrange(2, 20)
            question = f"Tom has {a} pens and buys {b}. How many?"
            answer = f"He has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}"
            yield json.dumps({"question": question, "answer": answer})

    return {
        "TRAIN_PATH": write_lines(folder / "train.jsonl", lines(40, 0)),
        "TEST_PATH": write_lines(folder / "test.jsonl", lines(10, 1)),
    }


def _flan_files(folder: pathlib.Path) -> dict[str, str]:
    def lines(number: int, seed: int) -> Iterable[str]:
        draw = random.Random(seed)
        for _ in range(number):
            noun = draw.choice(list(_NOUNS))
            yes = draw.choice(["yes", "no"])
            yield f"Is this a {noun}?\\nOptions: yes, no\t{yes}\tIt is {yes} a {noun}."

    return {
        "TRAIN_PATH": write_lines(folder / "train.tsv", lines(40, 0)),
        "VALIDATION_PATH": write_lines(folder / "validation.tsv", lines(10, 1)),
    }


WRITE_FILES: Mapping[str, Callable[[pathlib.Path], dict[str, str]]] = {
    "wmt_ende": _wmt_files,
    "xsum": _xsum_files,
    "gsm8k": _gsm8k_files,
    "flan2021": _flan_files,
}


def first_lines(path: pathlib.Path, number: int) -> list[str]:
    """The first lines of a file, plain or gzip."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return content.decode().split("\n")[:number]


_REAL_FILES = {
    "wmt_ende": {
        "TRAIN_INPUTS": "multi30k/train.en.gz",
        "TRAIN_TARGETS": "multi30k/train.de.gz",
        "VALIDATION_INPUTS": "multi30k/val.en.gz",
        "VALIDATION_TARGETS": "multi30k/val.de.gz",
    },
    "gsm8k": {"TRAIN_PATH": "gsm8k/train.jsonl", "TEST_PATH": "gsm8k/test.jsonl"},
    "flan2021": {
        "TRAIN_PATH": "flan_cot/cot_data/strategyqa_train.tsv",
        "VALIDATION_PATH": "flan_cot/cot_data/creak_train.tsv",
    },
}


def make_recipe_on_best(name: str, folder: pathlib.Path, **settings: Any) -> "Recipe":
    """On real data where `GKD_JAX_DATA` names them, else as `make_recipe` with these settings."""
    data = os.environ.get("GKD_JAX_DATA")
    if data and name in _REAL_FILES:
        return make_real_recipe(name, pathlib.Path(data), folder)
    return make_recipe(name, folder, **settings)


def make_real_recipe(name: str, data: pathlib.Path, folder: pathlib.Path) -> "Recipe":
    """As `make_recipe`, of 300 real examples to train on and 10 to evaluate."""
    folder.mkdir(parents=True)
    files = {
        setting: write_lines(
            folder / setting.lower(), first_lines(data / path, 300 if "TRAIN" in setting else 10)
        )
        for setting, path in _REAL_FILES[name].items()
    }
    return make_recipe(name, folder, files=files, vocab_size=500, lengths=(64, 32))


class Gin(str):
    """A value in gin's own words, e.g. a reference, where others are Python's."""

    def __repr__(self) -> str:
        return str(self)


HEAD_DIM, NUM_HEADS = 8, 2
STUDENT_WIDTH, TEACHER_WIDTH = 16, 24


def t5(width: int, vocab_size: int) -> T5:
    """The model that `Recipe.flags` configures."""
    sizes = dict(emb_dim=width, mlp_dim=2 * width, num_encoder_layers=1, num_decoder_layers=1)
    return T5(
        T5Config(
            vocab_size=vocab_size, num_heads=NUM_HEADS, head_dim=HEAD_DIM, dtype="float32", **sizes
        )
    )


@functools.cache
def init_params(width: int, vocab_size: int) -> Params:
    """Random parameters, of a seed of their own for each width."""
    return jax.jit(t5(width, vocab_size).init)(jax.random.key(width))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe with its small overrides, its files, and checkpoints to start from."""

    name: str
    settings: Mapping[str, str]

    def flags(self, model_dir: pathlib.Path, **changes: object) -> list[str]:
        """Flags of a run; a change of None leaves the setting out."""
        settings = {"MODEL_DIR": str(model_dir), **self.settings, **changes}
        files = [f"gin_configs/{self.name}.gin", f"gin_configs/small/{self.name}.gin"]
        return [
            *(f"--gin_file={file}" for file in files),
            *(f"--gin.{key}={value!r}" for key, value in settings.items() if value is not None),
        ]


def make_recipe(
    name: str,
    folder: pathlib.Path,
    *,
    files: Mapping[str, str] | None = None,
    vocab_size: int = 100,
    lengths: tuple[int, int] = (32, 16),
) -> Recipe:
    """Writes data, a vocabulary of it and random checkpoints of both models."""
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(files or WRITE_FILES[name](folder))
    texts = (
        line for path in files.values() for line in pathlib.Path(path).read_text().split("\n")[:400]
    )
    vocabulary = train_sentencepiece(
        texts, folder / "spm", vocab_size=vocab_size, model_type="bpe", byte_fallback=False
    )
    checkpoints = {}
    for key, width in (("student", STUDENT_WIDTH), ("teacher", TEACHER_WIDTH)):
        checkpoints[key] = str(folder / key)
        save_params(checkpoints[key], init_params(width, vocab_size))
    settings: dict[str, object] = {
        **files,
        "INITIAL_CHECKPOINT_PATH": checkpoints["student"],
        "TEACHER_CHECKPOINT_PATH": checkpoints["teacher"],
        "VOCABULARY_PATH": str(vocabulary),
        "VOCAB_SIZE": vocab_size,
        "TASK_FEATURE_LENGTHS": {"inputs": lengths[0], "targets": lengths[1]},
        "STUDENT_DIM": STUDENT_WIDTH,
        "STUDENT_MLP_DIM": 2 * STUDENT_WIDTH,
        "STUDENT_LAYERS": 1,
        "TEACHER_DIM": TEACHER_WIDTH,
        "TEACHER_MLP_DIM": 2 * TEACHER_WIDTH,
        "TEACHER_LAYERS": 1,
        "T5Config.num_heads": NUM_HEADS,
        "T5Config.head_dim": HEAD_DIM,
        "BATCH_SIZE": 4,
        "TRAIN_STEPS": 4,
        "WARMUP_STEPS": 2,
        "LEARNING_RATE": 1e-3,
        "EVAL_PERIOD": 10,
        "CHECKPOINT_PERIOD": 10,
        "Partitioner.data_parallelism": 1,
    }
    return Recipe(name, settings)


def run_main(*arguments: str) -> tuple[int, str, str]:
    """Runs the command line in this process; returns exit status, standard output and error."""
    argv = ["main", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", argv),
        flagsaver.flagsaver(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main.main(flags.FLAGS(main.rewrite_gin_flags(argv)))
        except SystemExit as error:
            status = int(error.code or 0)
    return status, out.getvalue(), err.getvalue()
