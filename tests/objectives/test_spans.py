"""Divergences of spans: against float64 by their definition, and against those of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_references import (
    ALL_IN_ONE,
    EVERY,
    TEMPERATURES,
    np_divergence,
    np_softmax,
    unembed,
)
from toy_vocabularies import STUDENT, TEACHER

from gkd_jax.common.batch import Batch
from gkd_jax.data.common_text import CommonText
from gkd_jax.data.vocabularies import ByteVocabulary
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.experiment.step_objectives import _vocabularies
from gkd_jax.objectives import (
    ForwardKL,
    GeneralizedJSD,
    Objective,
    Predictions,
    ReverseKL,
    SampledReverseKL,
    TotalVariation,
    WeightedSum,
    final_weights,
    fused,
    spans,
    weighted_loss,
)
from gkd_jax.training.teacher_tokens import Retokenizer

# Words that both split in one place, in different ones, and not at all.
TEXTS = ("abc ca", "ab cab", "ca ca", "aabbcc", "")
LENGTH = 9
FEW = (ForwardKL(), ReverseKL(), GeneralizedJSD(0.3), TotalVariation())
# All whose gradient is that of their value.
WITH_VALUES = WeightedSum(tuple(EVERY[:-1]), tuple(0.5 + 0.1 * i for i in range(len(EVERY) - 1)))


def retokenizer_of(student, teacher, sizes=None):
    sizes = sizes or (student.size, teacher.size)
    return Retokenizer(CommonText(student, teacher, sizes), Partitioner())


def rows_of(vocabulary, texts, length=LENGTH):
    rows = np.zeros((len(texts), length), np.int32)
    weights = np.zeros((len(texts), length), np.float32)
    for row, text in enumerate(texts):
        ids = [*vocabulary.encode(text), vocabulary.eos_ids[0]][:length]
        rows[row, : len(ids)], weights[row, : len(ids)] = ids, 1.0
    return rows, weights


def batch_of(retokenizer, vocabulary, texts, length=LENGTH):
    targets, weights = rows_of(vocabulary, texts, length)
    tokens = jax.tree.map(jnp.asarray, retokenizer.retokenize(targets, weights))
    inputs = jnp.ones((len(texts), 2), jnp.int32)
    return Batch(
        inputs=inputs, inputs_mask=inputs > 0, targets=jnp.asarray(targets),
        loss_weights=jnp.asarray(weights), example_id=jnp.arange(len(texts)),
        teacher_tokens=tokens,
    )  # fmt: skip


def objective_of(retokenizer, divergence, temperatures=(1.0, 1.0)):
    return spans.SpanObjective(
        divergence, *temperatures, vocabularies=_vocabularies(retokenizer._common)
    )


def logits_of(seed, *shape, scale=1.5):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def loss_of(objective, batch, logits, teacher_logits, weights=None):
    """(loss, per token), and the gradient of the student's logits."""
    if weights is None:
        weights = final_weights(batch.measured_weights, reduction="per_sequence")
    return _jit_loss(objective)(logits, teacher_logits, batch, weights)


@functools.cache
def _jit_loss(objective):
    def loss(logits, teacher_logits, batch, weights):
        heads = [jnp.eye(one.shape[-1]) for one in (logits, teacher_logits)]
        return spans.span_loss(
            objective,
            student=Predictions(logits, heads[0], unembed),
            teacher=Predictions(teacher_logits, heads[1], unembed),
            targets=batch.targets,
            tokens=batch.teacher_tokens,
            weights=weights,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def np_spans(retokenizer, batch, logits, teacher_logits, temperatures):
    """By the definition: row, first token, q, p and the place of its text, of each span."""
    common = set(STUDENT.pieces) & set(TEACHER.pieces)

    def label(piece):
        if isinstance(piece, bytes):
            found = [piece[:n] for n in range(1, len(piece) + 1) if piece[:n] in common]
            return found[-1] if found else "rest"
        return piece if piece in common else "rest"

    def distribution(vocabulary, probs, tokens, text):
        pieces, found = vocabulary.pieces, dict.fromkeys([*common, "rest", "span"], 0.0)
        chain = np.prod([probs[i + 1][token] for i, token in enumerate(tokens[1:])])
        for token, prob in enumerate(probs[0]):
            if token != tokens[0]:
                found[label(pieces[token])] += prob
        found[label(pieces[tokens[0]])] += probs[0][tokens[0]] * (1 - chain)
        found[text if text in common else "span"] += probs[0][tokens[0]] * chain
        return found

    q = np_softmax(logits, temperatures[0])
    p = np_softmax(teacher_logits, temperatures[1])
    view = jax.tree.map(np.asarray, batch.teacher_tokens)
    for row in range(len(logits)):
        for number in range(1, view.spans[row].max() + 1):
            own, theirs = (
                np.flatnonzero(one[row] == number) for one in (view.spans, view.teacher_spans)
            )
            tokens = batch.targets[row][own].tolist()
            teacher_tokens = view.targets[row][theirs].tolist()
            pieces = [STUDENT.pieces[token] for token in tokens]
            text = pieces[0] if isinstance(pieces[0], str) else b"".join(pieces)
            both = (
                distribution(STUDENT, q[row][own], tokens, text),
                distribution(TEACHER, p[row][theirs], teacher_tokens, text),
            )
            names = sorted(both[0], key=str)
            place = names.index(text if text in common else "span")
            values = [np.array([one[name] for name in names]) for one in both]
            yield row, own[0], *values, place


def np_loss(divergence, retokenizer, batch, logits, teacher_logits, temperatures, weights):
    total = 0.0
    with np.errstate(divide="ignore"):
        for row, first, q, p, place in np_spans(
            retokenizer, batch, logits, teacher_logits, temperatures
        ):
            keep = (q > 0) | (p > 0)
            place = np.flatnonzero(np.flatnonzero(keep) == place)
            value = np_divergence(divergence, np.log(q[keep]), np.log(p[keep]), place[0])
            total += weights[row, first] * value
    return total


@pytest.fixture(scope="module")
def toy():
    retokenizer = retokenizer_of(STUDENT, TEACHER)
    batch = batch_of(retokenizer, STUDENT, TEXTS)
    shape = (len(TEXTS), LENGTH)
    return (
        retokenizer,
        batch,
        logits_of(0, *shape, STUDENT.size),
        logits_of(1, *shape, TEACHER.size),
    )


@pytest.mark.parametrize("temperatures", TEMPERATURES[::3])
@pytest.mark.parametrize("divergence", [WITH_VALUES, SampledReverseKL()], ids=["all", "sampled"])
def test_values_and_gradients_are_those_of_the_definition(toy, divergence, temperatures):
    retokenizer, batch, logits, teacher_logits = toy
    view = batch.teacher_tokens
    lengths = [len({*row.tolist()} - {0}) for row in np.asarray(view.spans)]
    assert lengths == [3, 3, 3, 5, 1]
    assert np.asarray(batch.measured_weights).sum() == sum(lengths)
    weights = np.asarray(final_weights(batch.measured_weights, reduction="per_sequence"))
    objective = objective_of(retokenizer, divergence, temperatures)
    (loss, per_token), gradient = loss_of(objective, batch, logits, teacher_logits)
    arguments = (divergence, retokenizer, batch)
    wanted = np_loss(*arguments, logits, teacher_logits, temperatures, weights)
    assert float(loss) == pytest.approx(wanted, rel=2e-5, abs=1e-6)
    assert float((per_token * weights).sum()) == pytest.approx(wanted, rel=2e-5, abs=1e-6)
    if isinstance(divergence, SampledReverseKL):
        return  # Its gradient is not that of its value.
    rng = np.random.default_rng(2)
    step = 1e-5
    for _ in range(4):
        direction = rng.normal(size=logits.shape)
        above, below = (
            np_loss(
                *arguments, logits.astype(np.float64) + sign * step * direction, teacher_logits,
                temperatures, weights,
            )
            for sign in (1, -1)
        )  # fmt: skip
        slope = float((np.asarray(gradient, np.float64) * direction).sum())
        assert slope == pytest.approx((above - below) / (2 * step), rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("divergence", [*FEW, ALL_IN_ONE], ids=["fkl", "rkl", "jsd", "tv", "all"])
def test_over_one_vocabulary_it_is_the_divergence_of_tokens(divergence):
    vocabulary = ByteVocabulary()
    retokenizer = retokenizer_of(vocabulary, vocabulary)
    batch = batch_of(retokenizer, vocabulary, ("ab é", "", "a longer one than fits"))
    np.testing.assert_array_equal(batch.measured_weights, batch.loss_weights)
    logits, teacher_logits = (logits_of(seed, 3, LENGTH, vocabulary.size) for seed in (3, 4))
    temperatures = (0.7, 1.3)
    (loss, per_token), gradient = loss_of(
        objective_of(retokenizer, divergence, temperatures), batch, logits, teacher_logits
    )
    head = jnp.eye(vocabulary.size)

    def plain(logits):
        return weighted_loss(
            Objective(divergence, *temperatures),
            student=Predictions(logits, head, unembed),
            teacher=Predictions(teacher_logits, head, unembed),
            targets=batch.targets,
            weights=final_weights(batch.loss_weights, reduction="per_sequence"),
        )

    (wanted, wanted_per_token), wanted_gradient = jax.value_and_grad(plain, has_aux=True)(logits)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(per_token, wanted_per_token, rtol=2e-5, atol=1e-6)
    norm = np.linalg.norm(wanted_gradient)
    assert np.linalg.norm(gradient - wanted_gradient) <= 1e-6 * norm


@pytest.mark.parametrize("divergence", FEW[1:3], ids=["rkl", "jsd"])
def test_not_negative_and_nothing_where_the_merged_distributions_agree(divergence):
    """Teacher and student are one model of text: characters that are drawn one by one."""
    retokenizer = retokenizer_of(STUDENT, TEACHER)
    batch = batch_of(retokenizer, STUDENT, TEXTS)
    shape = (len(TEXTS), LENGTH)
    for seed in range(3):
        (_, per_token), _ = loss_of(
            objective_of(retokenizer, divergence), batch, logits_of(seed, *shape, STUDENT.size),
            logits_of(seed + 9, *shape, TEACHER.size),
        )  # fmt: skip
        assert np.asarray(per_token).min() >= 0
        counted = np.asarray(batch.measured_weights) > 0
        assert np.asarray(per_token)[counted].min() > 1e-3
        assert np.abs(np.asarray(per_token)[~counted]).max() == 0

    # A row of one span: "abc" is one token of the teacher's, two of the student's.
    batch = batch_of(retokenizer, STUDENT, ("abc",))
    logits, teacher_logits = np.zeros((1, LENGTH, STUDENT.size)), None
    ids = {piece: token for token, piece in enumerate(STUDENT.pieces)}
    first, second = ids[b"ab"], ids[b"c"]
    logits[0, 0, first], logits[0, 1, second] = 1.0, 0.5
    q, further = np_softmax(logits[0, 0]), np_softmax(logits[0, 1])[second]
    # The teacher says of each class what the student does, within it what it likes.
    p = np.full(TEACHER.size, 1e-30)
    theirs = {piece: token for token, piece in enumerate(TEACHER.pieces)}
    for piece, token in ids.items():
        text = piece if piece in theirs else {b"ca": b"c", b" c": b" ", b"ab": b"a"}.get(piece)
        p[theirs.get(text, theirs["<s>"])] += q[token]
    p[theirs[b"a"]] -= q[first] * further
    p[theirs[b"abc"]] += q[first] * further
    p[theirs[b" "]], p[theirs[b" ca"]] = 0.3 * p[theirs[b" "]], 0.7 * p[theirs[b" "]]
    teacher_logits = np.zeros((1, LENGTH, TEACHER.size))
    teacher_logits[0, 0] = np.log(p)
    (_, per_token), gradient = loss_of(
        objective_of(retokenizer, divergence), batch, logits.astype(np.float32),
        teacher_logits.astype(np.float32), jnp.ones((1, LENGTH)).at[0, 2].set(0.0),
    )  # fmt: skip
    assert abs(float(per_token[0, 0])) < 1e-6
    assert np.abs(np.asarray(gradient)[0, :2]).max() < 2e-6


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_confident_models_give_finite_values(scale):
    """A byte that surely follows leaves nothing to others; float32 must not say so."""
    retokenizer = retokenizer_of(STUDENT, TEACHER)
    batch = batch_of(retokenizer, STUDENT, TEXTS)
    logits = logits_of(0, len(TEXTS), LENGTH, STUDENT.size)
    logits += scale * np.eye(STUDENT.size)[batch.targets]
    teacher_logits = logits_of(1, len(TEXTS), LENGTH, TEACHER.size)
    for divergence in (ForwardKL(), GeneralizedJSD(0.5)):
        (loss, _), gradient = loss_of(
            objective_of(retokenizer, divergence), batch, logits, teacher_logits
        )
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("sizes", [(0, 1), (3, 2)])
def test_padding_of_output_layers_is_of_no_class(sizes):
    sizes = (STUDENT.size + sizes[0], TEACHER.size + sizes[1])
    retokenizer = retokenizer_of(STUDENT, TEACHER, sizes)
    batch = batch_of(retokenizer, STUDENT, TEXTS)
    shape = (len(TEXTS), LENGTH)
    arrays = [logits_of(seed, *shape, size) for seed, size in enumerate(sizes)]
    for one, vocabulary in zip(arrays, (STUDENT, TEACHER), strict=True):
        one[..., vocabulary.size :] = -np.inf
    objective = objective_of(retokenizer, GeneralizedJSD(0.3))
    plain = retokenizer_of(STUDENT, TEACHER)
    (loss, _), gradient = loss_of(objective, batch, np.nan_to_num(arrays[0], neginf=-1e4),
                                  np.nan_to_num(arrays[1], neginf=-1e4))  # fmt: skip
    wanted = loss_of(
        objective_of(plain, GeneralizedJSD(0.3)), batch, arrays[0][..., : STUDENT.size],
        arrays[1][..., : TEACHER.size],
    )  # fmt: skip
    np.testing.assert_allclose(loss, wanted[0][0], rtol=1e-6)
    np.testing.assert_allclose(gradient[..., : STUDENT.size], wanted[1], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2)])
def test_chunks_and_a_mesh_change_nothing(monkeypatch, data, model):
    retokenizer = retokenizer_of(STUDENT, TEACHER)
    texts = (*TEXTS[:4], *TEXTS[:4])
    batch = batch_of(retokenizer, STUDENT, texts)
    logits, teacher_logits = (
        logits_of(seed, 8, LENGTH, size) for seed, size in ((0, STUDENT.size), (1, TEACHER.size))
    )
    objective = objective_of(retokenizer, ALL_IN_ONE)
    whole = loss_of(objective, batch, logits, teacher_logits)
    monkeypatch.setattr(fused, "MIN_CHUNK", 4)
    monkeypatch.setattr(fused, "CHUNK_ENTRIES", 4 * STUDENT.size)
    monkeypatch.setattr(fused, "GROUP_ENTRIES", 2 * STUDENT.size)
    mesh = jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        put = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), batch)
        split = loss_of(
            objective, put, jax.device_put(logits, sharding),
            jax.device_put(teacher_logits, sharding),
        )  # fmt: skip
    for left, right in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-6)


def test_settings_that_spans_cannot_have_are_refused():
    retokenizer = retokenizer_of(STUDENT, TEACHER)
    with pytest.raises(ValueError, match=r"Objective\.z_loss .*on spans; got 0\.1"):
        spans.SpanObjective(
            ForwardKL(), z_loss=0.1, vocabularies=_vocabularies(retokenizer._common)
        )


def test_metrics_count_tokens_and_spans():
    retokenizer = retokenizer_of(STUDENT, TEACHER)
    batch = batch_of(retokenizer, STUDENT, ("abc ca",))
    # ab|c| c|a|end and abc| ca|end.
    metrics = spans.span_metrics(batch.teacher_tokens, batch.loss_weights)
    values = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    assert values == {
        "covered_share": 1.0, "one_to_one_share": pytest.approx(0.2),
        "tokens_per_span": pytest.approx(5 / 3), "teacher_tokens_per_span": 1.0,
    }  # fmt: skip
