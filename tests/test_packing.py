"""A step on packed rows is that on the same examples in rows of their own, for both models."""

import dataclasses

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import packed
import pytest

from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation import train_step
from gkd_jax.distillation.rollout import Rollout, sample_outputs
from gkd_jax.models.ensembles import RoutedModel
from gkd_jax.models.families import model_from_hf
from gkd_jax.objectives.divergences import GeneralizedJSD, NegativeLogLikelihood
from gkd_jax.objectives.objective import (
    Objective,
    Predictions,
    count_outputs,
    final_weights,
    weighted_loss,
)

pytestmark = pytest.mark.usefixtures("fully_compiled")

JSD = Objective(GeneralizedJSD(beta=0.3), teacher_temperature=0.7, z_loss=1e-3)
BOTH = packed.make()
# Student, teacher, and the reduction.
CASES = {
    "t5, fine-tuning": ("t5", None, "per_sequence"),
    "llama, fine-tuning per token": ("llama3", None, "per_token"),
    "t5 1.1 from t5": ("t5_1_1", "t5", "per_sequence"),
    "llama from t5 1.1": ("llama3", "t5_1_1", "per_sequence"),
    "t5 from gemma per token": ("t5", "gemma2", "per_token"),
    "gemma from llama": ("gemma2", "llama3", "per_sequence"),
}


def model(name):
    return name and model_from_hf(hf_models.make(name).config.to_dict(), dtype="float32")


def setting(case):
    student, teacher, reduction = CASES[case]
    objective = JSD if teacher else Objective(NegativeLogLikelihood())
    student, teacher = model(student), model(teacher)
    params = packed.random_params(student)
    of_teacher = teacher and packed.random_params(teacher, seed=8)
    return student, teacher, dataclasses.replace(objective, reduction=reduction), params, of_teacher


def weights_of(batch, objective):
    return final_weights(
        jnp.asarray(batch.loss_weights),
        reduction=objective.reduction,
        segments=batch.targets_segments,
    )


def gradient(case, batch, num_microbatches=1):
    student, teacher, objective, params, of_teacher = setting(case)
    fn = train_step.make_gradient_fn(student, teacher, objective, num_microbatches=num_microbatches)
    batch = jax.tree.map(jnp.asarray, batch)
    weights = weights_of(batch, objective)
    return jax.jit(fn)(params, of_teacher, batch, weights, jax.random.key(0))


def assert_same(one, other, rtol=2e-6):
    """Gradients to rounding, of the largest of each parameter, and metrics."""
    (grads, metrics), (expected, wanted) = one, other
    for left, right in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max())
    for name, (total, weight) in wanted.items():
        np.testing.assert_allclose(metrics[name], (total, weight), rtol=rtol, err_msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.pitfall(20)
def test_packed_loss_and_gradients_are_those_of_rows_of_their_own(case):
    grads, metrics = gradient(case, BOTH.packed)
    assert_same((grads, metrics), gradient(case, BOTH.alone))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert metrics["packed_examples"] == (len(packed.LENGTHS), 1)
    places = len(packed.ROWS) * sum(packed.WIDTHS)
    assert metrics["packed_share"] == (np.sum(packed.LENGTHS), places)


@pytest.mark.pitfall(20)
def test_a_teacher_reads_packed_rows_as_it_reads_each_example():
    """The divergence of every token, of a student that is the same in both."""
    for case in ("llama from t5 1.1", "t5 from gemma per token"):
        student, teacher, objective, params, of_teacher = setting(case)
        loss_fn = jax.jit(train_step.make_loss_fn(student, teacher, objective))
        values = [
            np.asarray(loss_fn(params, of_teacher, batch, weights_of(batch, objective))[1])
            for batch in (BOTH.packed, BOTH.alone)
        ]
        assert values[1].max() > 0.1
        np.testing.assert_allclose(BOTH.spread(values[0]), values[1], rtol=2e-5, atol=1e-6)


def test_the_plain_form_gives_the_same():
    student, teacher, objective, params, of_teacher = setting("llama from t5 1.1")

    def plain(params, batch):
        parts = [
            Predictions(one.hidden_states(own, batch), one.head(own), one.unembed)
            for one, own in ((student, params), (teacher, of_teacher))
        ]
        return weighted_loss(
            objective, student=parts[0], teacher=parts[1], targets=batch.targets,
            weights=weights_of(batch, objective),
        )[0]  # fmt: skip

    grads = jax.jit(jax.grad(plain))(params, jax.tree.map(jnp.asarray, BOTH.packed))
    assert_same((grads, {}), (gradient("llama from t5 1.1", BOTH.alone)[0], {}))


@pytest.mark.parametrize("reduction", ["per_sequence", "per_token"])
def test_packed_rows_in_microbatches_and_on_a_mesh(reduction, monkeypatch):
    """Rows have different numbers of examples, and of tokens."""
    case = "t5 1.1 from t5"
    monkeypatch.setitem(CASES, case, (*CASES[case][:2], reduction))
    alone = gradient(case, BOTH.alone)
    assert_same(gradient(case, BOTH.packed, num_microbatches=3), alone)
    partitioner = Partitioner(data_parallelism=3, devices=tuple(jax.devices()[:3]))
    batch = partitioner.shard_batch(BOTH.packed)
    student, teacher, objective, params, of_teacher = setting(case)
    fn = train_step.make_gradient_fn(student, teacher, objective, num_microbatches=1)

    def step(params, of_teacher, batch, key):
        return fn(params, of_teacher, batch, weights_of(batch, objective), key)

    arguments = jax.device_put((params, of_teacher), partitioner.replicated)
    assert_same(jax.jit(partitioner.annotate(step))(*arguments, batch, jax.random.key(0)), alone)


def test_weights_by_hand():
    """An output without any weight is none; padding of one row is no part of the next."""
    loss_weights = jnp.array([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1.0]])
    segments = jnp.array([[1, 1, 2, 3, 0], [1, 1, 2, 2, 2]])
    expected = np.array([[1 / 2, 1 / 2, 0, 1, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]]) / 3
    got = final_weights(loss_weights, reduction="per_sequence", segments=segments)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert count_outputs(loss_weights, segments) == 3
    assert count_outputs(loss_weights, None) == 2
    per_token = final_weights(loss_weights, reduction="per_token", segments=segments)
    np.testing.assert_allclose(per_token, loss_weights / 6, rtol=1e-6)
    nothing = final_weights(0 * loss_weights, reduction="per_sequence", segments=segments)
    np.testing.assert_array_equal(nothing, 0)


def test_teachers_by_source_of_packed_rows():
    """Each example of a row may have another teacher."""
    student, parts = model("t5"), (model("llama3"), model("t5_1_1"))
    routed = RoutedModel(parts, (1, 0))
    params = packed.random_params(student)
    of_teacher = tuple(packed.random_params(one, seed=9) for one in parts)
    source_id = np.array([0, 1, 1, 0, 1, 0], np.int32)
    at_positions = np.zeros(BOTH.packed.targets.shape, np.int32)
    for row, examples in enumerate(packed.ROWS):
        lengths = [packed.LENGTHS[example][1] for example in examples]
        at_positions[row, : sum(lengths)] = np.repeat(source_id[list(examples)], lengths)
    values = []
    for batch, of in ((BOTH.packed, at_positions), (BOTH.alone, source_id)):
        batch = batch.replace(source_id=jnp.asarray(of))
        loss_fn = jax.jit(train_step.make_loss_fn(student, routed, JSD))
        values.append(np.asarray(loss_fn(params, of_teacher, batch, weights_of(batch, JSD))[1]))
    np.testing.assert_allclose(BOTH.spread(values[0]), values[1], rtol=2e-5, atol=1e-6)


def test_no_outputs_are_sampled_for_packed_prompts():
    student = model("t5")
    with pytest.raises(ValueError, match=r"packed .*DatasetConfig\.pack.* False"):
        sample_outputs(
            student, packed.random_params(student), BOTH.packed, key=jax.random.key(0),
            rollout=Rollout(), eos_ids=(1,), pad_id=0,
        )  # fmt: skip
