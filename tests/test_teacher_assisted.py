"""Rollouts that a teacher helps: in the trainer's own jitted rollout, and what a run refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from gkd_jax.data.pipeline import Dataset
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.teachers import AverageStudent, Teacher
from gkd_jax.experiment import Student, prepare
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.objectives.divergences import NegativeLogLikelihood
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective
from gkd_jax.objectives.other_divergences import SampledReverseKL
from gkd_jax.run_modes import train
from gkd_jax.sampling.teacher_assisted import Corrected, TeacherMixed
from gkd_jax.training import jitted_functions, keys

ASSISTANCES = {"mixed": TeacherMixed(0.3), "corrected": Corrected(top_k=60)}


def gkd(model_dir, teacher, assistance, **changes):
    settings = {
        "rollout": Rollout(teacher_assistance=assistance),
        "outputs": OutputMix(1.0),
        "student": Student(small_runs.model()),
        "evaluation": None,
    }
    return small_runs.gkd(model_dir, teacher, **settings | changes)


def make_trainer(experiment):
    trainer = train.Trainer(experiment, Dataset(experiment.train_data))
    batch = experiment.partitioner.shard_batch(next(trainer.dataset.train_iterator()))
    return trainer, batch, trainer.init_state().params


def next_token_probs(model, params, batch):
    """Float64 probabilities after the softmax of a model's logits, [B, T, V]."""
    logits = np.asarray(model.unembed(params, model.hidden_states(params, batch)), np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return probs / probs.sum(-1, keepdims=True)


def combined_probs(assistance, student, teacher):
    """The distribution that outputs are sampled from, in NumPy."""
    if isinstance(assistance, TeacherMixed):
        return (1 - assistance.teacher_share) * student + assistance.teacher_share * teacher
    best = np.argsort(-teacher, axis=-1)[..., : assistance.top_k]
    kept = np.zeros_like(student)
    np.put_along_axis(kept, best, np.take_along_axis(student, best, -1), -1)
    return kept + (1 - kept.sum(-1, keepdims=True)) * teacher


@pytest.mark.parametrize("name", ASSISTANCES)
def test_samples_have_the_policys_log_probs(name, tiny_teacher, tmp_path):
    """Those of scoring the sampled outputs by both models, combined in NumPy."""
    assistance = ASSISTANCES[name]
    experiment = gkd(tmp_path, tiny_teacher, assistance)
    trainer, batch, params = make_trainer(experiment)
    sampled = trainer.rollout_fn((params, trainer.teacher_params), batch, jax.random.key(0))
    student = next_token_probs(experiment.student.model, params, sampled)
    teacher = next_token_probs(experiment.teacher.model, trainer.teacher_params, sampled)
    expected = np.log(combined_probs(assistance, student, teacher))
    expected = np.take_along_axis(expected, np.asarray(sampled.targets)[..., None], -1)[..., 0]
    counts = np.asarray(sampled.loss_weights) > 0
    got = np.asarray(sampled.sample_log_probs)
    np.testing.assert_allclose(got[counts], expected[counts], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["corrected", pytest.param("mixed", marks=pytest.mark.slow)])
def test_first_tokens_are_drawn_from_the_policys_distribution(name, tiny_teacher, tmp_path):
    """Chi-squared over 4000 samples of one prompt."""
    assistance = ASSISTANCES[name]
    rollout = Rollout(teacher_assistance=assistance, num_samples=1000, target_length=1)
    # Four times the same prompt, so that the four positions' noise is independent.
    experiment = gkd(
        tmp_path,
        tiny_teacher,
        assistance,
        rollout=rollout,
        train_data=small_runs.data(num_examples=1),
    )
    trainer, batch, params = make_trainer(experiment)
    # Away from uniform.
    params, trainer.teacher_params = jax.tree.map(
        lambda leaf: 2 * leaf, (params, trainer.teacher_params)
    )
    sampled = trainer.rollout_fn((params, trainer.teacher_params), batch, jax.random.key(1))
    student = next_token_probs(experiment.student.model, params, batch)[0, 0]
    teacher = next_token_probs(experiment.teacher.model, trainer.teacher_params, batch)[0, 0]
    expected = 4000 * combined_probs(assistance, student, teacher)
    counts = np.bincount(np.asarray(sampled.targets).ravel(), minlength=len(expected))

    def chi_squared(expected):
        likely = expected >= 5
        expected = np.append(expected[likely], expected[~likely].sum())
        observed = np.append(counts[likely], counts[~likely].sum())
        return ((observed - expected) ** 2 / expected).sum(), len(expected) - 1

    value, freedom = chi_squared(expected)
    assert freedom > 5
    assert value < freedom + 5 * np.sqrt(2 * freedom)
    for alone in (student, teacher):  # The test can tell the three apart.
        value, freedom = chi_squared(np.maximum(4000 * alone, 1e-3))
        assert value > freedom + 10 * np.sqrt(2 * freedom)


def test_a_teacher_of_the_training_state_helps_too(tiny_teacher, tmp_path):
    """The average as it is at the step: the outputs are those of a rollout with it."""
    experiment = gkd(tmp_path, tiny_teacher, TeacherMixed(0.9))
    experiment = dataclasses.replace(experiment, teacher=AverageStudent(0.5))
    trainer, batch, _ = make_trainer(experiment)
    state = trainer.init_state()
    state = state.replace(average=jax.tree.map(lambda leaf: 3 * leaf, state.average))
    key = keys.make_key(experiment.seed, keys.Purpose.ROLLOUT, 0)
    expected = trainer.rollout_metrics_fn(
        trainer.rollout_fn((state.params, state.average), batch, key)
    )
    student_alone = trainer.rollout_metrics_fn(
        trainer.rollout_fn((state.params, state.params), batch, key)
    )
    _, groups, _ = trainer.step(state, batch, 0)
    got = jax.device_get(groups["rollout"])
    assert got == jax.device_get(expected)
    assert got != jax.device_get(student_alone)


def test_the_teachers_parameters_are_an_argument(tiny_teacher, tmp_path):
    """In their compute dtype; other ones give other outputs without another compilation."""
    bfloat16 = Teacher(
        small_runs.model(small_runs.TEACHER_WIDTH, dtype="bfloat16"), str(tiny_teacher)
    )
    experiment = gkd(tmp_path, tiny_teacher, TeacherMixed(0.9))
    experiment = dataclasses.replace(experiment, teacher=bfloat16)
    trainer, batch, params = make_trainer(experiment)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.teacher_params)} == {
        jnp.dtype("bfloat16")
    }
    first = trainer.rollout_fn((params, trainer.teacher_params), batch, jax.random.key(0))
    trainer.teacher_params = jax.tree.map(
        lambda leaf: jax.device_put(2 * leaf, leaf.sharding), trainer.teacher_params
    )
    second = trainer.rollout_fn((params, trainer.teacher_params), batch, jax.random.key(0))
    vocabulary = experiment.train_data.vocabulary
    jitted = jitted_functions.jit_rollout(
        experiment.rollout,
        experiment.rollout.teacher_assistance.combine(experiment.student.model, bfloat16.model),
        experiment.partitioner,
        eos_ids=vocabulary.eos_ids,
        pad_id=vocabulary.pad_id,
    )
    assert jitted._cache_size() == 1
    assert not np.array_equal(first.sample_log_probs, second.sample_log_probs)


@pytest.mark.slow
def test_a_run_trains_on_them_and_evaluates_the_student_alone(tiny_teacher, tmp_path):
    """Before the first step scores are those of the student alone; what is trained on differs."""
    rows = {}
    for name, assistance in (("alone", None), ("corrected", Corrected(top_k=5))):
        evaluation = small_runs.gkd(tmp_path, tiny_teacher).evaluation
        experiment = gkd(
            tmp_path / name,
            tiny_teacher,
            assistance,
            evaluation=evaluation,
            num_steps=2,
            log_period=1,
        )
        train.train(experiment)
        rows[name] = small_runs.metrics(tmp_path / name)
    assert rows["alone"][0] == rows["corrected"][0]
    assert rows["alone"][0]["step"] == 0
    for name in ("train/on_policy/loss", "train/rollout/output_length"):
        assert rows["alone"][1][name] != rows["corrected"][1][name]


BAD = {
    "no teacher": ({"teacher": None}, r"teacher_assistance = .* got Experiment.teacher = None"),
    "a divergence without": (
        {"objective": Objective(NegativeLogLikelihood()), "outputs": OutputMix(0.0)},
        "got NegativeLogLikelihood, which reads no teacher",
    ),
    "another vocabulary": (
        {"teacher": Teacher(small_runs.model(small_runs.TEACHER_WIDTH, vocab_size=300), "/no")},
        r"got 300 \(teacher\) and 259 \(student\)",
    ),
    "more than there is": (
        {"rollout": Rollout(teacher_assistance=Corrected(top_k=260))},
        r"CorrectedModel.top_k must be from 1 to the vocabulary's size 259; got 260",
    ),
    "an estimate": (
        {"objective": Objective(SampledReverseKL())},
        "draws alone and now; .* Rollout.teacher_assistance",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_policy_that_cannot_be_followed_is_refused(case, tiny_teacher, tmp_path):
    changes, message = BAD[case]
    experiment = gkd(tmp_path, tiny_teacher, Corrected(top_k=5))
    with pytest.raises(ConfigurationError, match=message):
        prepare.prepare(dataclasses.replace(experiment, **changes), run_mode="train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeacherMixed(0.0), r"TeacherMixed.teacher_share must be between .* got 0.0"),
        (lambda: TeacherMixed(1.0), r"Set Rollout.teacher_assistance to None"),
        (lambda: Corrected(0), r"Corrected.top_k must be a whole number from 1 on; got 0"),
        (lambda: Corrected(2.5), r"Corrected.top_k must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
