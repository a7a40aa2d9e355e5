"""A stored teacher in the loss: the divergence of bucketed distributions, in every form of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_references import (
    EVERY_WITH_TEACHER,
    MIXED,
    np_central_differences,
    np_softmax,
    np_value,
    unembed,
)

from gkd_jax.common.batch import TeacherDistributions
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.objectives import (
    ForwardKL,
    GeneralizedJSD,
    Objective,
    Predictions,
    ReverseKL,
    fused,
    fused_weighted_loss,
    token_divergence,
    weighted_loss,
)

B, T, D, V, K = 8, 3, 5, 40, 6


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def bucketed(probs, ids):
    """Probabilities of the entries, and of all others together."""
    of_entries = np.take_along_axis(probs, np.maximum(ids, 0), -1) * (ids >= 0)
    others = probs.copy()
    for index in np.ndindex(ids.shape[:-1]):
        others[index][ids[index][ids[index] >= 0]] = 0.0
    return np.concatenate([of_entries, others.sum(-1, keepdims=True)], -1)


def top_k(log_p, k, places=None):
    """What a store of the k best entries holds, in float64; further places are empty."""
    ids = np.argsort(-log_p, axis=-1, kind="stable")[..., : places or k]
    ids[..., k:] = -1
    with np.errstate(divide="ignore"):
        logs = np.log(bucketed(np.exp(log_p), ids))
    return TeacherDistributions(logs[..., :-1], ids.astype(np.int32), logs[..., -1])


def to_float32(tree):
    return jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float32), tree)


def make_logits(seed=0, shape=(B * T,), size=V, scale=2.0):
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.normal(size=(2, *shape, size))
    return student, student + 1.5 * rng.normal(size=(*shape, size)) if seed % 2 else teacher


@functools.partial(jax.jit, static_argnums=(0, 4))
def values_and_gradients(divergence, student, teacher, targets, temperature=1.0):
    def total(student):
        values = token_divergence(
            divergence, student, teacher, targets,
            student_temperature=temperature, teacher_temperature=0.25,
        )  # fmt: skip
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values, gradient


@pytest.mark.pitfall(8)
@pytest.mark.pitfall(10)
@pytest.mark.pitfall(11)
@pytest.mark.parametrize("divergence", EVERY_WITH_TEACHER, ids=str)
def test_value_and_gradient_match_float64_numpy(divergence):
    """The divergence of the bucketed distributions, the student's of its whole softmax.

    The gradient by central differences of the float64 formula in every logit, those of the tail
    among them. The teacher's temperature is in the store, and not applied again.
    """
    temperature = 1.5
    student, teacher = make_logits(1)
    stored = top_k(log_softmax(teacher), K)
    p = bucketed(np.exp(log_softmax(teacher)), stored.ids)
    targets = stored.ids[:, 2]
    is_target = np.eye(K + 1, dtype=bool)[np.full(len(targets), 2)]

    def bucketed_student(logits):
        return bucketed(np_softmax(logits, temperature), stored.ids)

    q = bucketed_student(student)

    values, gradient = values_and_gradients(
        divergence, np.float32(student), to_float32(stored), targets, temperature
    )
    expected = np_value(divergence, q, p, is_target)
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
    expected = np_central_differences(
        lambda logits: np_value(divergence, bucketed_student(logits), p, is_target, held=q),
        student,
        step=1e-6,
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)
    assert np.abs(expected).max(axis=-1).min() > 1e-3


@pytest.mark.pitfall(10)
@pytest.mark.parametrize("divergence", [ForwardKL(), GeneralizedJSD(0.5)], ids=str)
def test_a_lower_bound_that_rises_to_the_full_divergence(divergence):
    """At k = 8, 64 and 256 of 1,000 entries it is about 0.3, 0.6 and 0.9 of the whole.

    A top-k that is cut off and clamped at 0, as some have it, has no gradient at all.
    """
    teacher, noise = np.random.default_rng(0).normal(size=(2, 16, 1000))
    student, teacher = 2.0 * teacher + 1.15 * noise, 2.0 * teacher
    targets = np.zeros(16, np.int32)
    log_p = log_softmax(teacher)
    full = np_value(divergence, np_softmax(student), np.exp(log_p), None)
    found = []
    for k in (8, 64, 256, 999, 1000):
        stored = to_float32(top_k(log_p, k, places=1000))
        values, gradient = values_and_gradients(divergence, np.float32(student), stored, targets)
        found.append(values)
        assert np.all(np.abs(gradient).max(-1) > 1e-5)
    assert np.all(np.diff(found[:-1], axis=0) > 0)
    assert np.all(found[2] < full)
    # One token is in the tail, or none: both are the whole distribution.
    np.testing.assert_allclose(found[-2], full, rtol=1e-5)
    np.testing.assert_allclose(found[-1], full, rtol=1e-5)
    shares = [np.mean(values) / full.mean() for values in found[:3]]
    np.testing.assert_allclose(shares, [0.3, 0.65, 0.9], atol=0.1)


@pytest.mark.pitfall(27)
@pytest.mark.parametrize("divergence", EVERY_WITH_TEACHER, ids=str)
def test_zero_probabilities_give_no_nan(divergence):
    """No tail, empty places, an entry of probability 0 for one side or for both."""
    student, teacher = make_logits(3)
    stored = to_float32(top_k(log_softmax(teacher), K))
    ids, log_probs, tail = (np.array(x) for x in (stored.ids, stored.log_probs, stored.tail))
    student[0, ids[0, 5]] = -np.inf
    ids[1, 3:] = -1
    log_probs[1, 3:] = tail[1] = -np.inf
    student[2, np.setdiff1d(np.arange(V), ids[2])] = -200.0
    log_probs[3, 4] = -np.inf
    student[4, ids[4, 5]] = log_probs[4, 5] = -np.inf
    tail[5] = -np.inf
    p = np.exp(np.concatenate([log_probs, tail[:, None]], -1).astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        logs = np.log(p).astype(np.float32)
    stored = TeacherDistributions(logs[:, :-1], ids, logs[:, -1])
    values, gradient = values_and_gradients(divergence, np.float32(student), stored, ids[:, 2], 1.5)
    assert not np.any(np.isnan(values))
    q = bucketed(np_softmax(student, 1.5), ids)
    is_target = np.eye(K + 1, dtype=bool)[np.full(len(ids), 2)]
    expected = np_value(divergence, q, p, is_target)
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
    # The gradient of an infinite divergence does not exist; every other is finite.
    assert np.all(np.isfinite(gradient[np.isfinite(values)]))


@pytest.mark.pitfall(10)
def test_a_tail_next_to_nothing_keeps_its_digits():
    """1 - sum would be 0 in float32, and the forward KL infinite."""
    student = np.array([[30.0, 28.0, 0.0, -2.0]], np.float32)
    teacher = np.array([[0.2, 0.3, 0.25, 0.25]])
    ids = np.array([[0, 1]], np.int32)
    p = bucketed(teacher, ids)
    stored = TeacherDistributions(np.float32(np.log(p[:, :-1])), ids, np.float32(np.log(p[:, -1])))
    values, gradient = values_and_gradients(ForwardKL(), student, stored, np.array([0]))
    q = bucketed(np.exp(log_softmax(student.astype(np.float64))), ids)
    assert 1.0 - np.float32(q[0, 0]) - np.float32(q[0, 1]) <= 0
    np.testing.assert_allclose(values, (p * np.log(p / q)).sum(-1), rtol=1e-5)
    share = np.exp([0.0, -2.0]) / np.exp([0.0, -2.0]).sum()
    np.testing.assert_allclose(gradient[0, 2:], -p[0, -1] * share, rtol=1e-5)


def test_the_mean_gradient_to_drawn_tokens_is_that_of_the_full_forward_kl():
    """Random sampling KD: 12 draws a token, 4,000 times; z-scores of every logit's mean.

    The same mean is far off for the JSD, whose slopes are not linear in P.
    """
    num_draws, times = 12, 4000
    student, teacher = (np.float32(x) for x in make_logits(4, shape=(1,), size=12, scale=1.0))
    p = np.exp(log_softmax(teacher.astype(np.float64)))[0]
    counts = np.random.default_rng(0).multinomial(num_draws, p / p.sum(), size=times)
    # The 11 most drawn entries at most are kept: here all, and the places without any are -1.
    ids = np.where(counts > 0, np.arange(12), -1).astype(np.int32)
    with np.errstate(divide="ignore"):
        log_p = np.log(counts / num_draws).astype(np.float32)
    stored = TeacherDistributions(log_p, ids, np.full(times, -np.inf, np.float32))
    many, targets = np.repeat(student, times, 0), np.zeros(times, np.int32)

    def z_scores(divergence):
        _, sampled = values_and_gradients(divergence, many, stored, targets)
        _, exact = values_and_gradients(divergence, student, np.log(p)[None] * 0.25, targets[:1])
        error = np.std(sampled, axis=0) / np.sqrt(times)
        return np.abs(np.mean(sampled, axis=0) - exact[0]) / error

    assert np.max(z_scores(ForwardKL())) < 3.5
    assert ForwardKL.is_linear_in_teacher
    assert np.max(z_scores(GeneralizedJSD(0.5))) > 20
    assert not GeneralizedJSD(0.5).is_linear_in_teacher


@pytest.mark.parametrize("divergence", EVERY_WITH_TEACHER, ids=str)
def test_what_is_linear_says_so(divergence):
    assert divergence.is_linear_in_teacher == (divergence in (ForwardKL(), MIXED))


# The loss of hidden states, in its plain form and in chunks.


def make_case(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    weights = (np.arange(T) < rng.integers(0, T + 1, B)[:, None]).astype(np.float32)
    stored = to_float32(top_k(log_softmax(make_logits(seed, shape=(B, T))[1]), K))
    return {
        "hidden": jnp.asarray(rng.normal(size=(B, T, D)), dtype),
        "head": jnp.asarray(rng.normal(size=(D, V)), dtype),
        "stored": stored,
        "targets": stored.ids[..., 1],
        "weights": weights / weights.sum(),
    }


def make_loss(form, objective):
    def loss(trained, case):
        return form(
            objective,
            student=Predictions(*trained, unembed),
            teacher=case["stored"],
            targets=case["targets"],
            weights=case["weights"],
        )

    def loss_and_gradients(case):
        trained = (case["hidden"], case["head"])
        return jax.value_and_grad(loss, has_aux=True)(trained, case)

    return jax.jit(loss_and_gradients)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "MIN_CHUNK", 4)
    monkeypatch.setattr(fused, "CHUNK_ENTRIES", 4 * V)


def assert_close(one, other, rtol=1e-6):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
        atol = rtol * max(np.abs(right).max(), 1e-6)
        np.testing.assert_allclose(left, right, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_equal_the_plain_form(dtype, small_chunks):
    case = make_case(dtype=dtype)
    objective = Objective(MIXED, student_temperature=2.0, z_loss=1e-3)
    plain, chunks = (
        make_loss(form, objective)(case) for form in (weighted_loss, fused_weighted_loss)
    )
    # Sums of bfloat16 gradients, over positions here and over chunks there, round differently.
    assert_close(chunks[0], plain[0])
    assert_close(chunks[1], plain[1], rtol=1e-6 if dtype == jnp.float32 else 2e-2)


def test_what_has_no_weight_may_be_anything(small_chunks):
    case = make_case(1)
    masked = case["weights"] == 0
    assert masked.any()
    expected = make_loss(fused_weighted_loss, Objective(ReverseKL()))(case)
    log_probs = np.where(masked[..., None], np.nan, case["stored"].log_probs)
    case["stored"] = case["stored"].replace(log_probs=log_probs)
    for form in (weighted_loss, fused_weighted_loss):
        assert_close(make_loss(form, Objective(ReverseKL()))(case), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_a_mesh_changes_nothing(shape, small_chunks):
    """Rows over 'data', the vocabulary over 'model'; and no device ever has all of it."""
    case, objective = make_case(2), Objective(GeneralizedJSD(0.3))
    expected = make_loss(weighted_loss, objective)(case)
    partitioner = Partitioner(data_parallelism=shape[0], model_parallelism=shape[1])
    rows, head = partitioner.sharding("data"), partitioner.sharding(None, "model")
    sharded = {
        name: jax.device_put(value, head if name == "head" else rows)
        for name, value in case.items()
    }
    loss = make_loss(fused_weighted_loss, objective)
    outputs = ((partitioner.replicated, rows), (rows, head))
    step = jax.jit(partitioner.annotate(loss), out_shardings=outputs)
    assert_close(jax.device_get(step(sharded)), jax.device_get(expected))
    program = step.lower(sharded).compile().as_text()
    gathered = re.findall(r"= (\S+) all-gather", program)
    assert not [text for text in gathered if re.search(rf"[\[,]{V}[\],]", text)]


def test_shapes_are_checked():
    case = make_case()
    case["weights"] = case["weights"][:, 1:]
    with pytest.raises(ValueError, match=r"weights must have the shape of the"):
        make_loss(fused_weighted_loss, Objective(ForwardKL()))(case)
    student = np.zeros((2, V), np.float32)
    whole = TeacherDistributions(np.zeros((2, V - 1), np.float32))
    with pytest.raises(ValueError, match=r"got 39 \(stored teacher\) and 40 \(student\)"):
        token_divergence(ForwardKL(), student, whole, np.zeros(2, np.int32))
