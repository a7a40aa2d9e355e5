"""Whole runs on packed rows: they learn what unpacked ones do, stop, go on, and refuse the rest."""

import dataclasses

import jax
import numpy as np
import pytest
import small_recipes
import small_runs

from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.teacher_store import StoreReader
from gkd_jax.distillation import train_step
from gkd_jax.distillation.stored_distributions import Full, TopK
from gkd_jax.distillation.teachers import StoredTeacher
from gkd_jax.experiment import Checkpoints, Evaluation, Generation, Storing, Student, prepare
from gkd_jax.experiment.plan import describe_plan
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.objectives.divergences import GeneralizedJSD
from gkd_jax.objectives.mixing import OutputMix, RisingFraction
from gkd_jax.objectives.objective import Objective, final_weights
from gkd_jax.run_modes import store_teacher, train

OBJECTIVE = Objective(GeneralizedJSD(beta=0.3), teacher_temperature=0.8)


def data(**changes):
    """Rows of two or three problems."""
    lengths = {"inputs": 112, "targets": 48}
    return small_runs.data(**dict(feature_lengths=lengths, pack=True) | changes)


def distillation(folder, teacher, **changes):
    settings = dict(
        train_data=data(), outputs=OutputMix(0.0), objective=OBJECTIVE, num_steps=6, log_period=2,
        evaluation=Evaluation(small_runs.data("validation"), period=6),
        checkpoints=Checkpoints(period=2, keep=10),
    )  # fmt: skip
    return small_runs.gkd(folder, teacher, **settings | changes)


@pytest.mark.slow
@pytest.mark.pitfall(43)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(tiny_teacher, tmp_path, monkeypatch):
    """Bit for bit, with dropout and microbatches; batches have different numbers of examples."""
    whole = distillation(tmp_path / "whole", tiny_teacher)
    expected = train.train(whole)
    stopped = distillation(tmp_path / "stopped", tiny_teacher)
    for step in (3, 5):
        with monkeypatch.context() as patch:
            small_runs.stop_at(patch, step)
            with pytest.raises(small_runs.Stopped):
                train.train(stopped)
    small_runs.assert_equal_bits(train.train(stopped).state, expected.state)
    rows = small_runs.metrics(tmp_path / "whole")
    assert rows == small_runs.metrics(tmp_path / "stopped")
    measured = [row for row in rows if "train/data/packed_share" in row]
    assert [row["step"] for row in measured] == [2, 4, 6]
    packing = Dataset(whole.train_data).packing
    shares = [row["train/data/packed_share"] for row in measured]
    assert np.mean(shares) == pytest.approx(packing.token_share, rel=0.1)
    numbers = [row["train/data/packed_examples"] for row in measured]
    assert np.mean(numbers) == pytest.approx(4 * packing.examples_per_row, rel=0.1)


def test_the_plan_counts_examples(tiny_teacher, tmp_path):
    experiment = distillation(tmp_path / "run", tiny_teacher)
    prepared = prepare.prepare(experiment, run_mode="train")
    plan = describe_plan(experiment, prepared)
    assert "steps: 6 of 4 packed rows in 2 microbatches" in plan
    packing = prepared.train_data.packing
    assert str(packing) in plan
    assert f"training data, {6 * 4 * packing.examples_per_row / 400:.2f} passes" in plan


def step_of(experiment, batch):
    """Loss and gradient of a batch."""
    student, objective = experiment.student.model, experiment.objective
    teacher = experiment.teacher_model
    params = student.init(jax.random.key(0))
    fn = train_step.make_gradient_fn(student, teacher, objective, num_microbatches=1)
    weights = final_weights(
        batch.loss_weights, reduction=objective.reduction, segments=batch.targets_segments
    )
    return jax.jit(fn)(params, None, batch, weights, jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize("sparsification", [Full(), TopK(5)], ids=["whole", "entries"])
def test_a_store_serves_packed_rows(sparsification, tiny_teacher, tmp_path):
    """It is written of examples in rows of their own, and knows each by its number."""
    train_data = data(num_examples=10, batch_size=2, seed=3)
    storing = Storing(train_data, str(tmp_path / "store"), sparsification)
    live = distillation(tmp_path / "run", tiny_teacher, train_data=train_data, storing=storing)
    store_teacher.store_teacher(live)
    stored = dataclasses.replace(
        live,
        teacher=StoredTeacher(storing.output),
        evaluation=None,
        student=Student(small_runs.model()),
    )
    dataset = prepare.prepare(stored, run_mode="train").train_data
    batch = next(dataset.train_iterator())
    count = int(batch.targets_segments.max(axis=1).sum())
    assert count > 2
    alone = dataclasses.replace(train_data, pack=False, batch_size=count).build()
    alone.use_stored_teacher(storing.output)
    one, other = (step_of(stored, each) for each in (batch, next(alone.train_iterator())))
    for left, right in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-6 * np.abs(right).max() + 1e-8)
    for name, pair in other[1].items():
        np.testing.assert_allclose(one[1][name], pair, rtol=1e-5, err_msg=name)
    assert isinstance(dataset.stored_teacher, StoreReader)
    train.train(stored)


def test_what_cannot_be_packed_is_refused(tiny_teacher, tmp_path):
    """One message for each, with the setting and the remedy."""
    packed_evaluation = Evaluation(data(split="validation"), period=6)
    for changes, wanted in (
        (dict(outputs=OutputMix(0.5)), r"student_data_fraction \(STUDENT_DATA_FRACTION\) to 0\.0"),
        (dict(outputs=OutputMix(RisingFraction(0.5, 6))), r"DatasetConfig\.pack to False"),
        (dict(outputs=OutputMix(1.0, per_example=True)), r"to one prompt a row; got OutputMix"),
        (dict(evaluation=packed_evaluation), r"in Evaluation\.data, .* training's data alone"),
    ):
        experiment = distillation(tmp_path / "run", tiny_teacher, **changes)
        with pytest.raises(ConfigurationError, match=wanted) as error:
            prepare.prepare(experiment, run_mode="train")
        assert len(error.value.problems) == 1
    experiment = distillation(tmp_path / "run", tiny_teacher, evaluation=packed_evaluation)
    generation = Generation(data(split="validation"), str(tmp_path / "out.jsonl"), model="teacher")
    experiment = dataclasses.replace(experiment, generation=generation)
    for run_mode, setting in (("eval", "Evaluation"), ("generate", "Generation")):
        with pytest.raises(ConfigurationError, match=rf"got True in {setting}\.data"):
            prepare.prepare(experiment, run_mode=run_mode)


@pytest.mark.slow
def test_a_recipe_packs_by_one_setting(tmp_path):
    """From the command line; the evaluation stays as it is."""
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "recipe")
    changes = {
        "train/data.DatasetConfig.pack": True, "STUDENT_DATA_FRACTION": 0.0,
        "TASK_FEATURE_LENGTHS": {"inputs": 96, "targets": 96}, "TRAIN_STEPS": 2,
        "Experiment.log_period": 1,
    }  # fmt: skip
    status, _, err = small_recipes.run_main(*recipe.flags(tmp_path / "run", **changes))
    assert status == 0, err
    rows = [row for row in small_runs.metrics(tmp_path / "run") if "train/data/loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["train/data/packed_examples"] > 4 for row in rows)
