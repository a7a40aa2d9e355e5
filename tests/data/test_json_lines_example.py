"""`examples/json_lines`: a task that is bound in gin alone."""

import pathlib

import pytest
import small_runs
from small_recipes import run_main

from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.sources import InMemory
from gkd_jax.data.task import Task, TextExample
from gkd_jax.experiment import Experiment
from gkd_jax.experiment.gin_files import configuration

ROOT = pathlib.Path(__file__).parents[2]
FILES = ["gin_configs/sft/arithmetic.gin", "examples/json_lines/headlines.gin"]
ROUGE = {"rouge1", "rouge2", "rougeL", "rougeLsum"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def flags(model_dir: pathlib.Path, *more: str) -> list[str]:
    files = [f"--gin_file={file}" for file in FILES]
    return [*files, f"--gin.MODEL_DIR='{model_dir}'", *more]


def test_the_task_s_text_and_metrics(tmp_path):
    config = configuration.parse(
        roots=(Experiment,), gin_files=FILES, bindings=[f"MODEL_DIR='{tmp_path}'"]
    )
    experiment = config.build()
    train, validation = (
        Dataset(data) for data in (experiment.train_data, experiment.evaluation.data)
    )
    assert (train.num_examples, validation.num_examples) == (16, 4)
    example = validation.raw(1)
    assert example.inputs.startswith("headline: Snow closed the mountain road")
    assert example.targets == "Snow closes mountain road"
    (rouge,) = validation.task.metrics
    scores = rouge([["Snow closes mountain road"]], ["Snow closes the road"])
    assert set(scores) == ROUGE
    # Three of four words each: precision and recall of 3/4.
    assert scores["rouge1"].value == pytest.approx(75.0)


@pytest.mark.slow
def test_the_example_trains_and_is_scored(tmp_path):
    small = [f"--gin.{name}={value}" for name, value in
             {"TRAIN_STEPS": 2, "WARMUP_STEPS": 1, "BATCH_SIZE": 8, "student/T5Config.emb_dim": 16,
              "student/T5Config.mlp_dim": 16, "EVAL_PERIOD": 2, "CHECKPOINT_PERIOD": 2}.items()
             ]  # fmt: skip
    status, _, err = run_main(*flags(tmp_path / "run", *small))
    assert status == 0, err
    row = small_runs.metrics(tmp_path / "run")[-1]
    assert {f"eval/{name}" for name in ROUGE} <= set(row)
    assert (tmp_path / "run" / "checkpoint_2").is_dir()


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            "FieldsToText.inputs_field='artcle'",
            "wants the field 'artcle', which example 0 of split",
        ),
        ("Task.metrics=@metrics.rouge", "must be a tuple of functions; got <function rouge"),
        ("Task.sources=@train/data.JsonLines()", "must map names of splits to sources; got JsonL"),
        ("Task.metrics=(@metrics.ruoge,)", "Did you mean 'rouge'?"),
    ],
)
def test_mistakes_are_told_before_training(binding, message, tmp_path):
    status, _, err = run_main(*flags(tmp_path / "run", f"--gin.{binding}", "--dry_run"))
    assert status != 0
    assert message in err
    assert "Traceback" not in err


def test_a_metric_that_cannot_be_computed_is_told_before_training(monkeypatch):
    def missing(references, predictions):
        raise ValueError("the metric ROUGE needs the package rouge_score")

    task = Task(
        "t", {"train": InMemory([{}] * 3)}, lambda _: TextExample("a", "b"), metrics=(missing,)
    )
    dataset = Dataset(small_runs.data("train", task=task))
    with pytest.raises(ValueError, match="needs the package rouge_score"):
        dataset.check_metrics()
