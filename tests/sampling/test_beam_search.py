"""Beam search against exhaustive search and a plain NumPy one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import HistoryModel, ScriptedModel, prompts, random_batch

from gkd_jax.common.batch import Batch
from gkd_jax.sampling.beam_search import BeamSearch, _top_few, beam_search
from gkd_jax.sampling.decode import decode
from gkd_jax.sampling.methods import Greedy

EOS = 1


def search(model, params, inputs, mask, *, num_beams=4, alpha=0.6, example_id=None, **settings):
    """Searches under jit."""
    settings = {"eos_ids": (EOS,), "pad_id": 0, "max_length": 6} | settings
    method = BeamSearch(num_beams=num_beams, alpha=alpha)
    search_fn = functools.partial(beam_search, model, method=method, **settings)
    return jax.jit(search_fn)(params, inputs, mask, example_id=example_id)


@pytest.fixture(scope="module")
def history():
    model = HistoryModel(vocab_size=11)
    return model, model.init(jax.random.key(2))


def plain_search(next_log_probs, *, num_beams, alpha, length, eos_ids):
    """The same search in float64 with lists; `next_log_probs` maps a prefix to [V]."""
    live, ended = [(0.0, ())], []
    for position in range(length):
        candidates = [
            (total + extra, (*prefix, token))
            for total, prefix in live
            for token, extra in enumerate(next_log_probs(prefix))
        ]
        candidates.sort(key=lambda item: -item[0])
        candidates = candidates[: num_beams * (1 + max(1, len(eos_ids)))]
        penalty = ((5 + position + 1) / 6) ** alpha
        ended += [(total / penalty, p) for total, p in candidates if p[-1] in eos_ids]
        ended = sorted(ended, key=lambda item: -item[0])[:num_beams]
        live = [item for item in candidates if item[1][-1] not in eos_ids][:num_beams]
    return ended or live


def make_next_log_probs(model, params, inputs, mask, length):
    @jax.jit
    def logits_of(tokens, position):
        batch = Batch(inputs, mask, tokens[None], jnp.ones((1, length)), jnp.zeros(1, jnp.int32))
        return model.unembed(params, model.hidden_states(params, batch))[0, position]

    @functools.cache
    def next_log_probs(prefix):
        tokens = jnp.asarray([*prefix, *[0] * (length - len(prefix))], jnp.int32)
        logits = np.asarray(logits_of(tokens, len(prefix)), np.float64)
        logits = logits - logits.max()
        return logits - np.log(np.exp(logits).sum())

    return next_log_probs


@pytest.mark.parametrize(
    ("num_beams", "alpha", "eos_ids"),
    [
        pytest.param(1, 0.6, (1,), marks=pytest.mark.slow),
        pytest.param(3, 0.0, (1,), marks=pytest.mark.slow),
        (2, 1.0, (1, 4)),
        (3, 0.6, ()),
    ],
)
def test_equals_a_plain_search(history, num_beams, alpha, eos_ids):
    model, params = history
    length = 6
    batch = random_batch(jax.random.key(0), batch_size=4, source=4, target=length, vocab_size=11)
    beams = search(
        model,
        params,
        batch.inputs,
        batch.inputs_mask,
        num_beams=num_beams,
        alpha=alpha,
        eos_ids=eos_ids,
        max_length=length,
    )
    for row in range(4):
        next_log_probs = make_next_log_probs(
            model, params, batch.inputs[row : row + 1], batch.inputs_mask[row : row + 1], length
        )
        wanted = plain_search(
            next_log_probs, num_beams=num_beams, alpha=alpha, length=length, eos_ids=eos_ids
        )
        for place, (wanted_score, tokens) in enumerate(wanted):
            size = len(tokens)
            assert beams.tokens[row, place].tolist() == [*tokens, *[0] * (length - size)]
            assert beams.weights[row, place].tolist() == [1] * size + [0] * (length - size)
            np.testing.assert_allclose(beams.scores[row, place], wanted_score, atol=1e-5)
            parts = [next_log_probs(tokens[:i])[tokens[i]] for i in range(size)]
            np.testing.assert_allclose(beams.log_probs[row, place, :size], parts, atol=1e-5)
            assert bool(beams.finished[row, place]) == (tokens[-1] in eos_ids)
        assert (np.asarray(beams.scores[row, len(wanted) :]) == -np.inf).all()


def test_many_beams_find_the_best_of_all_outputs():
    # Positions are independent, so all 5**3 outputs are scored at once.
    table = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32)
    log_probs = np.asarray(jax.nn.log_softmax(table, axis=-1), np.float64)[0]
    inputs, mask = prompts([[0]])
    beams = search(ScriptedModel(5), jnp.asarray(table), inputs, mask, num_beams=2, max_length=3)
    scores = {}
    for size in (1, 2, 3):
        for head in itertools.product([0, 2, 3, 4], repeat=size - 1):
            output = (*head, EOS)
            total = sum(log_probs[i, token] for i, token in enumerate(output))
            scores[output] = total / ((5 + size) / 6) ** 0.6
    best = max(scores, key=scores.__getitem__)
    assert beams.tokens[0, 0, : len(best)].tolist() == list(best)
    np.testing.assert_allclose(beams.scores[0, 0], scores[best], atol=1e-6)


def test_one_beam_without_ends_is_greedy(history):
    model, params = history
    batch = random_batch(jax.random.key(0), batch_size=4, source=4, target=8, vocab_size=11)
    outputs = [
        jax.jit(
            functools.partial(decode, model, method=method, max_length=8, eos_ids=(), pad_id=0)
        )(params, batch.inputs, batch.inputs_mask)
        for method in (Greedy(), BeamSearch(num_beams=1))
    ]
    np.testing.assert_array_equal(outputs[0].tokens, outputs[1].tokens)
    np.testing.assert_allclose(outputs[0].log_probs, outputs[1].log_probs, atol=1e-6)
    assert outputs[1].truncated.all()


def peaked_script(length):
    """Prompt 0 wants to end at once, prompt 1 never."""
    table = np.full((2, length, 12), -30.0, np.float32)
    table[0, :, EOS] = 0.0
    table[0, :, 2] = -8.0
    table[1, :, 2] = 0.0
    table[1, :, 3] = -1.0
    return jnp.asarray(table)


@pytest.mark.pitfall(34)
def test_stops_when_no_beam_can_improve():
    params = peaked_script(40)
    one, mask = prompts([[0]])
    settings = {"max_length": 40, "num_beams": 2}
    beams = search(ScriptedModel(12), params, one, mask, **settings)
    assert int(beams.steps_run) <= 4
    both, mask = prompts([[0], [1]])
    beams = search(ScriptedModel(12), params, both, mask, **settings)
    assert int(beams.steps_run) == 40
    with_filler = search(
        ScriptedModel(12), params, both, mask, **settings, example_id=jnp.array([0, -1])
    )
    assert int(with_filler.steps_run) <= 4
    np.testing.assert_array_equal(with_filler.tokens[0], beams.tokens[0])
    assert with_filler.weights[1].sum() == 0
    assert not with_filler.finished[1].any()


@pytest.mark.pitfall(15)
def test_pad_equals_eos_keeps_final_eos():
    one, mask = prompts([[0]])
    beams = search(ScriptedModel(12), peaked_script(5), one, mask, max_length=5, pad_id=EOS)
    assert beams.weights[0, :2].tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert beams.tokens[0, 1].tolist() == [2, EOS, EOS, EOS, EOS]


@pytest.mark.parametrize("size", [12, 50, 1000, 4096])
def test_top_few_equals_top_k(size):
    rng = np.random.default_rng(0)
    values = rng.integers(0, size // 8, (6, size)).astype(np.float32)
    values[0] = -np.inf
    values[1, 3:] = -np.inf
    values[2, :-2] = -np.inf
    values[3] = 1.0
    found = jax.jit(_top_few, static_argnums=1)(values, 7)
    for one, other in zip(found, jax.lax.top_k(values, 7), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_position():
    one, mask = prompts([[0]])
    beams = search(ScriptedModel(12), peaked_script(1), one, mask, max_length=1, num_beams=2)
    assert beams.tokens[0].tolist() == [[EOS], [0]]
    assert beams.finished[0].tolist() == [True, False]
    np.testing.assert_array_equal(np.isinf(beams.scores[0]), [False, True])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, r"BeamSearch.num_beams must be at least 1; got 0"),
        ({"alpha": -0.1}, r"BeamSearch.alpha must be at least 0; got -0.1"),
        ({"num_beams": 7}, "BeamSearch.num_beams needs a vocabulary of 14 entries; got 12"),
        ({"max_length": 0}, "max_length must be at least 1; got 0"),
        ({"eos_ids": (12,)}, "eos_ids must lie in the model's vocabulary"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    one, mask = prompts([[0]])
    with pytest.raises(ValueError, match=message):
        search(ScriptedModel(12), peaked_script(2), one, mask, **{"max_length": 2} | settings)
