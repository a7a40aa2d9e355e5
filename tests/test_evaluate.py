"""Evaluation: every example counts once, whatever completes the last batch."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_runs

from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.recipes import instruction
from gkd_jax.data.sources import InMemory
from gkd_jax.experiment import Evaluation, Student
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.run_modes import evaluate, train
from gkd_jax.run_modes.evaluate import Evaluator
from gkd_jax.sampling.beam_search import BeamSearch
from gkd_jax.sampling.methods import Greedy, Sample
from gkd_jax.training import parameters

SLOW = pytest.mark.slow
METHODS = {"greedy": Greedy(), "sample": Sample(), "beam": BeamSearch(num_beams=2)}


def evaluator_of(model_dir, teacher, *, batch_size=small_runs.BATCH_SIZE, **changes):
    """An evaluator of the ten held-out examples, with the student's and teacher's parameters."""
    data = small_runs.data("validation", batch_size=batch_size)
    evaluation = dataclasses.replace(Evaluation(data, method=Sample()), **changes)
    experiment = small_runs.gkd(
        model_dir,
        teacher,
        # The trained teacher as student: other outputs than noise.
        student=Student(small_runs.model(small_runs.TEACHER_WIDTH), str(teacher)),
        evaluation=evaluation,
        num_microbatches=1,
    )
    params = parameters.init_params(experiment)
    # A teacher that differs from it.
    teacher_params = jax.tree.map(lambda leaf: leaf * 1.1, params)
    return Evaluator(experiment, Dataset(data)), params, teacher_params


@pytest.mark.parametrize(
    "method", ["sample", *(pytest.param(name, marks=SLOW) for name in ("greedy", "beam"))]
)
def test_each_example_counts_once(method, tiny_teacher, tmp_path):
    """Batches of 4, 4 and 2 with two fillers give what batches of 5 and 5 without any give."""
    results = []
    for batch_size in (4, 5):
        evaluator, params, teacher_params = evaluator_of(
            tmp_path / str(batch_size), tiny_teacher, batch_size=batch_size, method=METHODS[method]
        )
        results.append(evaluator(params, teacher_params, step=3))
    padded, whole = results
    assert len(padded.predictions) == small_runs.NUM_HELDOUT
    assert padded.predictions == whole.predictions
    names = set(padded.scores)
    assert names == set(whole.scores)
    assert {"on_data/loss", "on_samples/loss", "samples/repetition"} <= names
    for name in names:
        left, right = padded.scores[name].value, whole.scores[name].value
        assert left == pytest.approx(right, rel=1e-5), name


def test_scores_of_known_outputs(tiny_teacher, tmp_path):
    """The data's own outputs score 100; four of ten spoilt, 60 with its standard error."""
    evaluator, params, _ = evaluator_of(tmp_path, tiny_teacher, num_divergence_examples=0)
    evaluator._decode = lambda params, batch, key: batch
    result = evaluator(params, None, step=1)
    assert result.values()["gsm8k_accuracy"] == 100.0
    lengths = [len(evaluator.dataset.raw(i).targets) + 1 for i in range(small_runs.NUM_HELDOUT)]
    assert result.values()["outputs/output_length"] == pytest.approx(np.mean(lengths), rel=1e-6)
    assert result.values()["outputs/truncated_share"] == 0.0

    def spoil(params, batch, key):
        is_spoilt = (batch.example_id >= 0) & (batch.example_id < 4)
        return dataclasses.replace(
            batch, targets=np.where(np.asarray(is_spoilt)[:, None], 70, batch.targets)
        )

    evaluator._decode = spoil
    values = evaluator(params, None, step=2).values()
    assert values["gsm8k_accuracy"] == pytest.approx(60.0)
    # Of a share of n: sqrt(p (1 - p) / n).
    expected = 100 * np.sqrt(0.6 * 0.4 / 10)
    assert values["gsm8k_accuracy_se"] == pytest.approx(expected)


@pytest.mark.pitfall(46)
def test_evaluation_reports_task_metric_and_divergence(tiny_teacher, tmp_path):
    """The divergence to the teacher on data and on samples, and the task's metric."""
    evaluator, params, teacher_params = evaluator_of(tmp_path, tiny_teacher)
    scores = evaluator(params, teacher_params, step=0).values()
    assert {"gsm8k_accuracy", "gsm8k_accuracy_se"} <= set(scores)
    assert scores["on_data/loss"] > 1e-5
    assert scores["on_samples/loss"] > 1e-5
    # It is the divergence, not a cross-entropy: the student against itself has none.
    itself = evaluator(params, params, step=0).values()
    assert itself["on_data/loss"] == itself["on_samples/loss"] == 0.0
    # Samples are of the rollout and of the student: the teacher does not change them.
    assert itself["samples/output_length"] == scores["samples/output_length"]


def test_the_number_of_examples_of_the_divergence(tiny_teacher, tmp_path):
    evaluator, params, teacher_params = evaluator_of(tmp_path, tiny_teacher)
    seen = []
    objective = evaluator._objective

    def count(params, teacher_params, batch):
        seen.append(np.asarray(batch.example_id).tolist())
        return objective(params, teacher_params, batch)

    evaluator._objective = count
    for number, batches in ((0, 0), (1, 1), (4, 1), (5, 2), (512, 3)):
        evaluator.config = dataclasses.replace(evaluator.config, num_divergence_examples=number)
        seen.clear()
        scores = evaluator(params, teacher_params, step=0).scores
        assert len(seen) == 2 * batches  # On data and on samples.
        assert ("on_data/loss" in scores) == (batches > 0)


def test_sampled_evaluations_differ_by_step_only(tiny_teacher, tmp_path):
    evaluator, params, teacher_params = evaluator_of(tmp_path, tiny_teacher)
    first, again, later = (evaluator(params, teacher_params, step=step) for step in (5, 5, 6))
    assert first.predictions == again.predictions
    assert first.scores == again.scores
    assert first.predictions != later.predictions


def test_files_of_predictions_and_scores(tiny_teacher, tmp_path):
    evaluator, params, teacher_params = evaluator_of(tmp_path, tiny_teacher)
    result = evaluator(params, teacher_params, step=7)
    rows = small_runs.rows(tmp_path / "eval" / "predictions_7.jsonl")
    assert [row["prediction"] for row in rows] == result.predictions
    examples = [evaluator.dataset.raw(index) for index in range(small_runs.NUM_HELDOUT)]
    assert [row["inputs"] for row in rows] == [example.inputs for example in examples]
    assert [row["references"] for row in rows] == [list(e.references) for e in examples]
    scores = json.loads((tmp_path / "eval" / "scores_7.json").read_text())
    assert set(scores) == set(result.scores)
    assert scores["gsm8k_accuracy"]["standard_error"] is not None


def test_texts_with_unusual_line_ends_stay_on_one_line(tiny_teacher, tmp_path):
    texts = [f"one\u2028two\x85three {number}" for number in range(6)]
    source = InMemory(tuple({"inputs": text, "targets": text} for text in texts))
    task = instruction(train=source, validation=source)
    evaluator, params, _ = evaluator_of(tmp_path, tiny_teacher, num_divergence_examples=0)
    evaluator.dataset = Dataset(small_runs.data("validation", task=task))
    evaluator(params, None, step=0)
    rows = small_runs.rows(tmp_path / "eval" / "predictions_0.jsonl")
    assert [row["inputs"] for row in rows] == texts


def test_run_mode_eval_takes_the_newest_checkpoint(tiny_teacher, tmp_path):
    """Or the initial one where the run has none; and needs one of them."""
    student = Student(small_runs.model(small_runs.TEACHER_WIDTH))
    evaluation = Evaluation(small_runs.data("validation"), method=Sample())
    run = tmp_path / "run"
    experiment = small_runs.sft(run, student=student, evaluation=evaluation)
    trained = train.train(experiment)
    result = evaluate.evaluate(experiment)
    scores = {name: value for name, value in trained.scores.items() if name != "seconds"}
    assert result.values() == scores
    assert (run / "eval" / "scores_5.json").exists()
    # Fine-tuning measures its own objective on held-out data, and no samples.
    assert "on_data/loss" in scores
    assert "on_samples/loss" not in scores

    initial = dataclasses.replace(student, initial_checkpoint=str(run / "checkpoint_5"))
    elsewhere = dataclasses.replace(experiment, model_dir=str(tmp_path / "new"), student=initial)
    again = evaluate.evaluate(elsewhere)
    assert again.values()["on_data/loss"] == scores["on_data/loss"]
    with pytest.raises(ConfigurationError, match=r"no checkpoint in Experiment\.model_dir"):
        evaluate.evaluate(dataclasses.replace(elsewhere, student=student))
    with pytest.raises(ConfigurationError, match=r"Experiment\.evaluation; got None"):
        evaluate.evaluate(dataclasses.replace(experiment, evaluation=None))


def test_eval_without_its_teacher_leaves_the_divergence_out(tiny_teacher, tmp_path):
    experiment = small_runs.gkd(
        tmp_path,
        tiny_teacher,
        student=Student(small_runs.model(small_runs.TEACHER_WIDTH), str(tiny_teacher)),
    )
    result = evaluate.evaluate(dataclasses.replace(experiment, teacher=None))
    assert "gsm8k_accuracy" in result.scores
    assert not any(name.startswith("on_") for name in result.scores)
