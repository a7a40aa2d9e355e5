"""Teachers of their own sources: each example of a mixture is taught by one of several networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from gkd_jax.checkpoints.save import save_params
from gkd_jax.common.batch import Batch
from gkd_jax.data.mixtures import Mixture
from gkd_jax.data.recipes import arithmetic
from gkd_jax.distillation import train_step
from gkd_jax.distillation.replay import Replay
from gkd_jax.distillation.teachers import RoutedTeachers, Teacher
from gkd_jax.experiment import Evaluation, Generation
from gkd_jax.experiment.prepare import ConfigurationError, prepare
from gkd_jax.objectives.divergences import GeneralizedJSD
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective, final_weights
from gkd_jax.run_modes import evaluate, train
from gkd_jax.sampling.methods import Sample
from gkd_jax.sampling.teacher_assisted import TeacherMixed

OBJECTIVE = Objective(GeneralizedJSD(beta=0.3), teacher_temperature=0.7)


def mixed_task(**changes):
    """Three sources in each split: problems of one, two and three steps."""
    parts = [
        arithmetic(num_train=12, num_heldout=4, min_steps=steps, max_steps=steps)
        for steps in (1, 2, 3)
    ]
    sources = {
        split: Mixture(tuple(part.sources[split] for part in parts))
        for split in ("train", "validation")
    }
    return dataclasses.replace(parts[0], name="mixed", sources=sources | changes)


def routed_run(folder, tiny_teacher, **changes):
    """Steps 1 and 3 from the tiny teacher, step 2 from one of another width."""
    other = small_runs.model(16)
    if not (folder / "other").exists():
        save_params(folder / "other", other.init(jax.random.key(3)))
    good = Teacher(small_runs.model(small_runs.TEACHER_WIDTH), str(tiny_teacher))
    teacher = RoutedTeachers([good, Teacher(other, str(folder / "other"))], [0, 1, 0])
    data = small_runs.data(task=mixed_task())
    heldout = dataclasses.replace(data, split="validation")
    settings = dict(
        teacher=teacher, train_data=data, num_steps=4, outputs=OutputMix(1.0),
        evaluation=Evaluation(heldout, period=4, method=Sample()),
    )  # fmt: skip
    run = folder / "run"
    return dataclasses.replace(small_runs.gkd(run, tiny_teacher), **settings | changes)


def random_batch(source_id) -> Batch:
    generator = np.random.default_rng(0)
    rows = len(source_id)
    return Batch(
        inputs=jnp.asarray(generator.integers(3, 259, (rows, 6)), jnp.int32),
        inputs_mask=jnp.ones((rows, 6), bool),
        targets=jnp.asarray(generator.integers(3, 259, (rows, 5)), jnp.int32),
        loss_weights=jnp.ones((rows, 5)),
        example_id=jnp.arange(rows),
        source_id=jnp.asarray(source_id, jnp.int32),
    )


@pytest.mark.parametrize(
    "teacher_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_each_row_is_compared_with_its_own_teacher(teacher_dtype):
    student = small_runs.model()
    models = [small_runs.model(width, dtype=teacher_dtype) for width in (16, 24)]
    teacher = RoutedTeachers(tuple(Teacher(model, "unread") for model in models), (1, 0, 1))
    routed = teacher.model_for(student)
    params = jax.tree.map(lambda leaf: 3 * leaf, routed.init(jax.random.key(1)))
    own = student.init(jax.random.key(0))
    batch = random_batch([0, 1, 2, 1, 0])
    weights = final_weights(batch.loss_weights, reduction="per_sequence")

    def losses(model, params):
        loss_fn = train_step.make_loss_fn(student, model, OBJECTIVE)
        grad_fn = jax.jit(jax.value_and_grad(lambda *args: loss_fn(*args)[1].sum()))
        per_token = jax.jit(loss_fn)(own, params, batch, weights)[1]
        return np.asarray(per_token), grad_fn(own, params, batch, weights)[1]

    of_routed, gradient = losses(routed, params)
    alone = [losses(model, one)[0] for model, one in zip(models, params, strict=True)]
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    expected = np.stack([alone[part][row] for row, part in enumerate([1, 0, 1, 0, 1])])
    np.testing.assert_allclose(of_routed, expected, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_batches_tell_the_source_of_each_example(tmp_path, tiny_teacher):
    prepared = prepare(routed_run(tmp_path, tiny_teacher), run_mode="train")
    data = prepared.train_data
    batch = next(data.train_iterator())
    sources = [data.source_index(position) // 12 for position in range(4)]
    np.testing.assert_array_equal(batch.source_id, sources)
    seen = np.concatenate([batch.source_id for batch, _ in prepared.eval_data.eval_batches()])
    np.testing.assert_array_equal(seen, np.repeat([0, 1, 2], 4))


@pytest.mark.slow
def test_a_run_with_replay_goes_on_as_if_it_had_not_stopped(tmp_path, tiny_teacher, monkeypatch):
    """On-policy: sampled and kept outputs keep the source of their prompt."""
    experiment = routed_run(tmp_path, tiny_teacher, replay=Replay(capacity=8, refresh=0.5))
    whole = train.train(experiment)
    for name in ("on_data/loss", "on_samples/loss"):
        assert evaluate.evaluate(experiment).values()[name] == whole.scores[name] > 0

    stopped = dataclasses.replace(
        experiment, model_dir=str(tmp_path / "stopped"),
        checkpoints=dataclasses.replace(experiment.checkpoints, period=3),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        small_runs.stop_at(patch, 3)
        with pytest.raises(small_runs.Stopped):
            train.train(stopped)
    small_runs.assert_equal_bits(train.train(stopped).state, whole.state)


def test_what_cannot_be_routed_is_refused(tmp_path, tiny_teacher):
    good = Teacher(small_runs.model(small_runs.TEACHER_WIDTH), str(tiny_teacher))
    experiment = routed_run(tmp_path, tiny_teacher)
    rollout = dataclasses.replace(experiment.rollout, teacher_assistance=TeacherMixed())
    generation = Generation(
        small_runs.data("validation"), str(tmp_path / "out.jsonl"), model="teacher"
    )
    plain = small_runs.data("validation")
    for changes, run_mode, message in (
        (dict(train_data=small_runs.data()), "train", r"each of 3 sources of a mixture; got 1 in"),
        (dict(evaluation=Evaluation(plain)), "eval", r"each of 3 .* got 1 in split 'validation'"),
        (dict(teacher=RoutedTeachers((good,), (0, 0))), "train", r"each of 2 sources .* got 3 in"),
        (
            dict(rollout=rollout),
            "train",
            r"Rollout\.teacher_assistance .* RoutedTeachers, which score",
        ),
        (dict(generation=generation), "generate", r"RoutedTeachers, which score outputs only"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            prepare(dataclasses.replace(experiment, **changes), run_mode=run_mode)
    for routes in ((0, 1), (0, 0, -1), ()):
        with pytest.raises(ValueError, match=r"RoutedTeachers\.routes must name teachers from 0"):
            RoutedTeachers((good,), routes)
