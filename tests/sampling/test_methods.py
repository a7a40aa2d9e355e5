"""Choosing tokens: exact frequencies, exact supports, exact log-probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gkd_jax.sampling.methods import (
    FANOUT,
    Greedy,
    Sample,
    _dense_uniforms,
    _keep_top_k,
    _num_levels,
    _pick,
    position_keys,
    row_keys,
)


def softmax64(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    masses = np.exp(scaled - scaled.max())
    return masses / masses.sum()


@functools.partial(jax.jit, static_argnums=0)
def choose(method, logits, keys):
    rows = jnp.broadcast_to(logits[None], (keys.shape[0], logits.shape[0]))
    return method.choose(rows, keys=keys)


def draw(method, logits, count, seed=0, chunk=4000):
    """Draws `count` tokens from one row of logits."""
    logits = jnp.asarray(logits, jnp.float32)
    key = jax.random.key(seed)
    parts = [
        choose(method, logits, jax.random.split(jax.random.fold_in(key, i), chunk))
        for i in range(count // chunk)
    ]
    return tuple(np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2))


def assert_frequencies(tokens, probabilities, least=5.0):
    """Chi-squared test; entries expected less than `least` times are counted together."""
    counts = np.bincount(tokens, minlength=len(probabilities)).astype(np.float64)
    assert len(counts) == len(probabilities)
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(tokens)
    rare = expected < least
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) == 1:
        return
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def long_tail(vocab_size, seed=0):
    """Zipf-like logits in random order, every seventh entry impossible."""
    rng = np.random.default_rng(seed)
    logits = -1.3 * np.log(1 + rng.permutation(vocab_size)).astype(np.float32)
    logits[::7] = -np.inf
    return logits


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("vocab_size", [5, 1003, 4 * FANOUT**2 + 5])
def test_frequencies_are_the_softmax(vocab_size, temperature):
    logits = long_tail(vocab_size)
    tokens, _ = draw(Sample(temperature=temperature), logits, 16_000)
    assert_frequencies(tokens, softmax64(logits, temperature))


def test_whole_vocabulary_is_reached_when_flat():
    vocab_size = 2 * FANOUT**2 + 1
    tokens, _ = draw(Sample(), np.zeros(vocab_size), 16_000)
    assert_frequencies(tokens, np.full(vocab_size, 1 / vocab_size))


def test_few_random_numbers_a_row():
    assert [_num_levels(n) for n in (2, 64, 65, 1024, 32_000, 32_128, 65_536)] == [
        *[1, 1, 2, 2, 3, 3, 3]
    ]


def test_impossible_groups_are_never_drawn():
    logits = np.full(1027, -np.inf, np.float32)
    logits[[263, 1026]] = 0.0
    tokens, log_probs = draw(Sample(), logits, 4_000)
    assert set(tokens) == {263, 1026}
    np.testing.assert_allclose(log_probs, np.log(0.5), rtol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 2.0**-64, 1 - 2.0**-24, 1.0])
def test_mass_zero_is_never_picked_at_the_ends(uniform):
    masses = jnp.array([[0.0, 1.0, 0.0, 0.5, 0.0]])
    assert int(_pick(masses, jnp.array([uniform]))[0]) in (1, 3)


def test_tiny_masses_keep_their_share():
    # The exact set of uniforms that picks each entry, found by bisection: its width must be the
    # entry's probability to float32 accuracy, also for 1e-12 beside masses of order 1.
    masses = np.array([0.7, 1e-12, 0.2, 3e-9, 0.1, 1e-7], np.float32)
    pick = jax.jit(lambda u: _pick(jnp.broadcast_to(masses, (u.shape[0], 6)), u))
    order = np.argsort(masses)
    lows = np.zeros(6)
    highs = np.ones(6)
    rank = np.argsort(order)
    for _ in range(80):
        middle = ((lows + highs) / 2).astype(np.float32)
        below = rank[np.asarray(pick(jnp.asarray(middle)))] <= np.arange(6)
        lows, highs = np.where(below, middle, lows), np.where(below, highs, middle)
    widths = np.diff(np.append(0.0, highs))[rank]
    np.testing.assert_allclose(widths, masses / masses.sum(dtype=np.float64), rtol=2e-6)


def test_uniforms_are_dense_near_zero():
    keys = jax.random.split(jax.random.key(1), 200_000)
    uniforms = np.asarray(jax.jit(lambda k: _dense_uniforms(k, count=2))(keys), np.float64)
    for column in uniforms.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(uniforms.T)[0, 1]) < 0.01
    # Below 2**-12 a grid of 2**-23 would leave 11 bits; here no two are equal.
    small = uniforms[uniforms < 2.0**-12]
    assert len(small) > 50
    assert len(np.unique(small * 2.0**23 % 1)) == len(small)


def test_rare_groups_are_drawn_at_their_rate():
    # 600 of 1200 entries share a probability of 1e-3, at every level of the tree.
    logits = np.zeros(1200, np.float32)
    logits[300:900] = np.log(1e-3 / (1 - 1e-3))
    tokens, _ = draw(Sample(), logits, 60_000, seed=3)
    rare = (tokens >= 300) & (tokens < 900)
    assert stats.binomtest(int(rare.sum()), len(tokens), 1e-3).pvalue > 1e-3


def test_greedy_takes_the_lowest_of_equal_logits():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    tokens, log_probs = jax.jit(Greedy().choose)(logits)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(
        log_probs, [np.log(softmax64(logits[0])[1]), np.log(0.25)], rtol=1e-6
    )


def test_top_k_keeps_exactly_k_with_renormalised_frequencies():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=700).astype(np.float32)
    kept = np.argsort(-logits)[:9]
    tokens, _ = draw(Sample(top_k=9), logits, 20_000)
    wanted = np.zeros(700)
    wanted[kept] = softmax64(logits)[kept]
    assert set(tokens) == set(kept)
    assert_frequencies(tokens, wanted / wanted.sum())


def test_top_k_ties_keep_the_lowest_ids():
    logits = np.array([0.0, 1.0, 0.5, 0.5, 0.5, 0.5], np.float32)
    tokens, _ = draw(Sample(top_k=3), logits, 4_000)
    assert set(tokens) == {1, 2, 3}


def test_top_k_of_a_large_vocabulary():
    """Groups are ranked first: of equal values in and across groups the lowest ids are kept."""
    vocab_size = 5 * FANOUT * 4
    rng = np.random.default_rng(0)
    for distinct in (7, vocab_size):
        logits = rng.integers(0, distinct, (20, vocab_size)).astype(np.float32) / 4 - 1
        logits[:10, ::3] = -np.inf
        kept = np.isfinite(jax.jit(lambda x: _keep_top_k(x, 5))(logits))
        wanted = np.zeros_like(kept)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        np.put_along_axis(wanted, order, True, axis=1)
        np.testing.assert_array_equal(kept, wanted)


@pytest.mark.parametrize("top_p", [0.05, 0.9])
def test_top_p_of_a_long_tail(top_p):
    logits = long_tail(4 * FANOUT + 5, seed=4)
    probs = softmax64(logits)
    order = np.argsort(-probs)
    kept = order[: 1 + int(np.sum(np.cumsum(probs[order]) < top_p))]
    tokens, _ = draw(Sample(top_p=top_p), logits, 4_000)
    wanted = np.zeros_like(probs)
    wanted[kept] = probs[kept]
    assert set(tokens) <= set(kept)
    assert_frequencies(tokens, wanted / wanted.sum())


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_top_p_ends_on_rows_that_are_no_distribution(bad):
    logits = np.zeros((2, 70), np.float32)
    logits[0] = bad
    tokens, _ = jax.jit(Sample(top_p=0.5).choose)(logits, keys=jax.random.split(jax.random.key(0)))
    assert 0 <= tokens[1] < 35


@pytest.mark.parametrize(
    ("top_p", "size"), [(0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.99, 5), (1e-6, 1)]
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p, size):
    probabilities = np.array([0.05, 0.3, 0.15, 0.4, 0.1])
    kept = np.argsort(-probabilities)[:size]
    tokens, _ = draw(Sample(top_p=top_p), np.log(probabilities), 20_000)
    wanted = np.zeros(5)
    wanted[kept] = probabilities[kept]
    assert set(tokens) == set(kept)
    assert_frequencies(tokens, wanted / wanted.sum())


def test_top_p_ties_keep_the_lowest_ids():
    tokens, _ = draw(Sample(top_p=0.5), np.zeros(8), 4_000)
    assert set(tokens) == {0, 1, 2, 3}


def test_top_p_is_a_share_of_what_top_k_left():
    # Of the top 3 (0.4, 0.3, 0.15) the first two are 0.82; of the whole only 0.7.
    logits = np.log([0.05, 0.3, 0.15, 0.4, 0.1])
    tokens, _ = draw(Sample(top_k=3, top_p=0.8), logits, 4_000)
    assert set(tokens) == {1, 3}


@pytest.mark.pitfall(23)
@pytest.mark.parametrize("method", [Sample(), Sample(top_p=1.0), Sample(top_k=600)])
def test_no_default_cut_leaks_into_sampling(method):
    logits = long_tail(600, seed=5)
    tokens, _ = draw(method, logits, 20_000, seed=2)
    assert_frequencies(tokens, softmax64(logits))
    assert Sample() == Sample(temperature=1.0, top_k=None, top_p=None)


@pytest.mark.parametrize("method", [Sample(0.5), Sample(0.5, top_k=4), Sample(0.5, top_p=0.6)])
def test_log_probs_are_at_the_temperature_before_any_cut(method):
    logits = long_tail(900)
    tokens, log_probs = draw(method, logits, 4_000)
    np.testing.assert_allclose(log_probs, np.log(softmax64(logits, 0.5)[tokens]), atol=3e-6)


def test_keys_depend_on_example_sample_and_position_alone():
    key = jax.random.key(0)
    ids, samples = jnp.array([4, 4, 9]), jnp.array([0, 1, 0])
    keys = position_keys(row_keys(key, example_id=ids, sample_index=samples), jnp.int32(5))
    for row in range(3):
        alone = jax.random.fold_in(jax.random.fold_in(key, ids[row]), samples[row])
        alone = jax.random.fold_in(alone, 5)
        assert (jax.random.key_data(keys[row]) == jax.random.key_data(alone)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"Sample.temperature .* got 0.0. .* use Greedy\(\)"),
        ({"temperature": float("nan")}, "Sample.temperature"),
        ({"temperature": -1.0}, "Sample.temperature"),
        ({"top_k": 0}, "Sample.top_k must be at least 1; got 0"),
        ({"top_p": 0.0}, "Sample.top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, "Sample.top_p"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sample(**settings)


def test_sample_without_keys_is_refused():
    with pytest.raises(ValueError, match="needs random keys"):
        Sample().choose(jnp.zeros((1, 4)), keys=None)
