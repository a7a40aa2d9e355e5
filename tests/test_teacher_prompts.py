"""Teacher and student that read the same example by templates of their own, in whole runs."""

import dataclasses

import jax
import numpy as np
import pytest
import small_runs

from gkd_jax.data.chat import ChatTemplate
from gkd_jax.distillation import train_step
from gkd_jax.distillation.replay import Replay
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.teachers import StoredTeacher
from gkd_jax.experiment import Evaluation, Generation, Storing, prepare
from gkd_jax.objectives.divergences import GeneralizedJSD
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective, final_weights
from gkd_jax.run_modes import evaluate, generate, store_teacher, train
from gkd_jax.sampling.teacher_assisted import TeacherMixed

LENGTHS = {"inputs": 48, "targets": 24, "teacher_inputs": 56}


@pytest.fixture
def template(tmp_path):
    pytest.importorskip("jinja2")
    folder = tmp_path / "template"
    folder.mkdir()
    text = "{% for one in messages %}Q: {{ one.content }} A:{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)
    return ChatTemplate(str(folder))


def run_with(template, folder, teacher, **changes):
    words = dict(teacher_chat=template, feature_lengths=LENGTHS)
    evaluation = Evaluation(small_runs.data("validation", **words), period=4)
    settings = dict(
        train_data=small_runs.data(**words), evaluation=evaluation, num_steps=4,
        outputs=OutputMix(1.0),
    )  # fmt: skip
    return small_runs.gkd(folder, teacher, **settings | changes)


@pytest.mark.pitfall(38)
def test_the_teacher_is_asked_by_its_own_prompt(template, tiny_teacher, tmp_path):
    experiment = run_with(template, tmp_path / "run", tiny_teacher)
    dataset = prepare.prepare(experiment, run_mode="train").train_data
    batch = next(dataset.train_iterator())
    text = dataset.config.vocabulary.decode(batch.teacher_inputs[0].tolist())
    own = dataset.config.vocabulary.decode(batch.inputs[0].tolist())
    assert text == f"Q: {own} A:"

    student, teacher = experiment.student.model, experiment.teacher.model
    params, teacher_params = (model.init(jax.random.key(0)) for model in (student, teacher))
    objective = Objective(GeneralizedJSD(beta=0.3))
    weights = final_weights(batch.loss_weights, reduction="per_sequence")
    loss_fn = jax.jit(train_step.make_loss_fn(student, teacher, objective))
    got = loss_fn(params, teacher_params, batch, weights)[1]
    alike = dataclasses.replace(batch, teacher_inputs=None, teacher_inputs_mask=None)
    assert np.abs(got - loss_fn(params, teacher_params, alike, weights)[1]).max() > 1e-4

    log_probs = []
    for model, one, read in (
        (student, params, batch), (teacher, teacher_params, batch.as_teacher_reads()),
    ):  # fmt: skip
        logits = np.asarray(model.unembed(one, model.hidden_states(one, read)), np.float64)
        log_probs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    q, p = np.exp(log_probs)
    m = 0.3 * p + 0.7 * q
    expected = (0.3 * p * np.log(p / m) + 0.7 * q * np.log(q / m)).sum(-1) * batch.loss_weights
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_whole_run_with_replay_and_what_the_teacher_writes(
    template, tiny_teacher, tmp_path, monkeypatch
):
    experiment = run_with(
        template, tmp_path / "run", tiny_teacher, replay=Replay(capacity=8, refresh=0.5)
    )
    whole = train.train(experiment)
    assert evaluate.evaluate(experiment).values()["on_samples/loss"] > 0
    stopped = dataclasses.replace(
        experiment, model_dir=str(tmp_path / "stopped"),
        checkpoints=dataclasses.replace(experiment.checkpoints, period=3),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        small_runs.stop_at(patch, 3)
        with pytest.raises(small_runs.Stopped):
            train.train(stopped)
    small_runs.assert_equal_bits(train.train(stopped).state, whole.state)

    outputs = []
    for name, words in (("own", dict(teacher_chat=template)), ("asked", dict(chat=template))):
        path = tmp_path / f"{name}.jsonl"
        data = small_runs.data("validation", **words)
        generation = Generation(
            dataclasses.replace(data, feature_lengths={"inputs": 56, "targets": 24}), str(path),
            model="teacher",
        )  # fmt: skip
        generate.generate(dataclasses.replace(experiment, generation=generation))
        outputs.append([row["targets"] for row in small_runs.rows(path)])
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_a_store_holds_what_the_teacher_says_of_its_own_prompts(template, tiny_teacher, tmp_path):
    live = run_with(template, tmp_path / "live", tiny_teacher, outputs=OutputMix(0.0))
    live = dataclasses.replace(live, evaluation=None)
    from gkd_jax.distillation.stored_distributions import Full

    storing = Storing(live.train_data, str(tmp_path / "store"), Full())
    store_teacher.store_teacher(dataclasses.replace(live, storing=storing))
    stored = dataclasses.replace(
        live, teacher=StoredTeacher(str(tmp_path / "store")), model_dir=str(tmp_path / "stored")
    )
    left, right = (train.train(one).state.params for one in (live, stored))
    for one, other in zip(*map(jax.tree.leaves, (left, right)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)
    plain = dataclasses.replace(stored, train_data=small_runs.data())
    with pytest.raises(prepare.ConfigurationError, match=r"is of other data.*teacher_chat"):
        prepare.prepare(plain, run_mode="train")


def test_a_policy_of_both_is_refused(template, tiny_teacher, tmp_path):
    experiment = run_with(
        template, tmp_path / "run", tiny_teacher, rollout=Rollout(teacher_assistance=TeacherMixed())
    )
    with pytest.raises(prepare.ConfigurationError, match=r"teacher_assistance .*teacher_chat"):
        prepare.prepare(experiment, run_mode="train")
