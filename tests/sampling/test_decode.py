"""The scan decoder on toy models: ends, weights, keys, chunks, samples, T5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toy import HistoryModel, ScriptedModel, prompts, random_batch, tiny_t5, write_script

from gkd_jax.common.batch import Batch
from gkd_jax.sampling.beam_search import BeamSearch
from gkd_jax.sampling.decode import decode
from gkd_jax.sampling.methods import Greedy, Sample

EOS = 1


def run(model, params, inputs, mask, *, method=None, key=None, example_id=None, **settings):
    """Decodes under jit."""
    settings = {"eos_ids": (EOS,), "pad_id": 0, "max_length": 12} | settings
    decode_fn = functools.partial(decode, model, method=method or Greedy(), **settings)
    return jax.jit(decode_fn)(params, inputs, mask, key=key, example_id=example_id)


def run_script(rows, *, vocab_size=10, length=12, **settings):
    params = write_script(rows, vocab_size=vocab_size, length=length)
    inputs, mask = prompts([[row] for row in range(len(rows))])
    return run(ScriptedModel(vocab_size), params, inputs, mask, max_length=length, **settings)


def score(model, params, inputs, mask, decoded, *, temperature=1.0):
    """Log-probabilities of outputs by one teacher-forced pass, in float64."""
    repeats = decoded.tokens.shape[0] // inputs.shape[0]
    batch = Batch(
        inputs=jnp.repeat(inputs, repeats, axis=0),
        inputs_mask=jnp.repeat(mask, repeats, axis=0),
        targets=decoded.tokens,
        loss_weights=decoded.weights,
        example_id=jnp.arange(decoded.tokens.shape[0]),
    )
    logits = jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))(params, batch)
    scaled = np.asarray(logits, np.float64) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    log_probs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, np.asarray(decoded.tokens)[..., None], -1)[..., 0]
    return chosen * np.asarray(decoded.weights)


@pytest.mark.pitfall(17)
def test_tokens_after_eos_have_weight_zero():
    out = run_script([[5, 6, EOS, 7, 7], [EOS], [4] * 11 + [EOS], [8]])
    weights = np.zeros((4, 12))
    weights[0, :3] = weights[1, :1] = weights[2:] = 1
    np.testing.assert_array_equal(out.weights, weights)
    assert out.tokens[0].tolist() == [5, 6, EOS] + [0] * 9
    assert out.tokens[1].tolist() == [EOS] + [0] * 11
    assert out.lengths.tolist() == [3, 1, 12, 12]
    assert out.truncated.tolist() == [False, False, False, True]
    assert (np.asarray(out.log_probs)[weights == 0] == 0).all()
    np.testing.assert_allclose(np.asarray(out.log_probs)[weights == 1], 0, atol=1e-9)


@pytest.mark.pitfall(15)
def test_pad_equals_eos_keeps_final_eos():
    out = run_script([[5, EOS, 3], [6, 6, 6, EOS]], pad_id=EOS)
    assert out.weights.sum(1).tolist() == [2, 4]
    assert out.tokens[0].tolist() == [5] + [EOS] * 11
    assert not out.truncated.any()


def test_output_may_contain_the_padding_id():
    out = run_script([[5, 0, 0, 6, EOS]])
    assert out.weights[0].tolist() == [1] * 5 + [0] * 7


def test_several_ends_and_none():
    rows = [[5, 3, EOS], [5, EOS, 3], [5, 5, 5]]
    assert run_script(rows, eos_ids=(EOS, 3)).lengths.tolist() == [2, 2, 12]
    out = run_script(rows, eos_ids=())
    assert out.lengths.tolist() == [12, 12, 12]
    assert out.truncated.all()
    assert out.tokens[1].tolist() == [5, EOS] + [3] * 10


@pytest.mark.pitfall(34)
def test_decoding_stops_when_every_output_has_ended():
    rows = [[5, EOS], [5, 6, 7, EOS]]
    out = run_script(rows, length=64, chunk_size=8)
    assert int(out.steps_run) <= 1 + 8
    assert out.lengths.tolist() == [2, 4]
    assert int(run_script([*rows, [5]], length=64, chunk_size=8).steps_run) == 64


def test_filler_rows_wait_for_nothing_and_weigh_nothing():
    out = run_script(
        [[5, EOS], [4]], length=64, chunk_size=8, example_id=jnp.array([7, -1]), pad_id=2
    )
    assert int(out.steps_run) <= 9
    assert out.weights.sum(1).tolist() == [2, 0]
    assert out.tokens[1].tolist() == [2] * 64
    assert not out.truncated.any()


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 16), (2, 1), (9, 7), (17, 16), (30, 7)])
def test_any_length_and_chunk_give_the_same(length, chunk_size):
    rows = [[2, 3, 4, 5, 6, 7, 8, 9] * 4, [5, 5, EOS]]
    out = run_script(rows, length=length, chunk_size=chunk_size, eos_ids=(EOS,))
    assert out.tokens.shape == out.weights.shape == out.log_probs.shape == (2, length)
    assert out.tokens[0].tolist() == rows[0][:length]
    assert out.tokens[1].tolist() == (rows[1] + [0] * 27)[:length]
    assert out.truncated.tolist() == [True, length < 3]
    assert int(out.steps_run) == length


def test_an_end_beyond_the_length_does_not_count():
    # Positions 1 to 7 go in two chunks of 4: the surplus step writes the end-of-sequence token.
    params = write_script([[5] * 8 + [EOS]], vocab_size=10, length=16)
    inputs, mask = prompts([[0]])
    out = run(ScriptedModel(10), params, inputs, mask, max_length=8, chunk_size=4)
    assert out.truncated.tolist() == [True]


@pytest.fixture(scope="module")
def history():
    model = HistoryModel(vocab_size=23)
    return model, model.init(jax.random.key(5))


def naive_greedy(model, params, inputs, mask, length):
    """Greedy decoding by whole forward passes, row by row."""
    tokens = np.zeros((inputs.shape[0], length), np.int32)
    weights = np.zeros((inputs.shape[0], length))
    forward = jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))
    ended = np.zeros(inputs.shape[0], bool)
    for t in range(length):
        batch = Batch(
            inputs, mask, jnp.asarray(tokens), jnp.asarray(weights), jnp.arange(len(mask))
        )
        best = np.asarray(forward(params, batch))[:, t].argmax(-1)
        tokens[:, t] = np.where(ended, 0, best)
        weights[:, t] = ~ended
        ended |= best == EOS
    return tokens, weights


@pytest.mark.parametrize(
    "kind", ["history", "t5_1_1", pytest.param("t5_1_0", marks=pytest.mark.slow)]
)
def test_cached_decoding_equals_naive_decoding(kind, history):
    if kind == "history":
        model, params = history
    else:
        model, params = tiny_t5(first_version=kind == "t5_1_0")
    batch = random_batch(
        jax.random.key(1), batch_size=5, source=6, target=14, vocab_size=model.vocab_size
    )
    out = run(model, params, batch.inputs, batch.inputs_mask, max_length=14, chunk_size=5)
    tokens, weights = naive_greedy(model, params, batch.inputs, batch.inputs_mask, 14)
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.weights, weights)
    assert len(np.unique(tokens)) > 3


@pytest.mark.parametrize(
    ("method", "first_version"),
    [
        pytest.param(Sample(0.7), False, marks=pytest.mark.slow),
        (Sample(1.3, top_k=5, top_p=0.9), True),
        (BeamSearch(3), False),
    ],
    ids=str,
)
def test_log_probs_equal_scoring(method, first_version):
    model, params = tiny_t5(first_version=first_version)
    batch = random_batch(jax.random.key(1), batch_size=6, source=7, target=10, vocab_size=40)
    out = run(
        model,
        params,
        batch.inputs,
        batch.inputs_mask,
        method=method,
        key=jax.random.key(3),
        max_length=10,
        num_samples=3 if isinstance(method, Sample) else 1,
    )
    temperature = getattr(method, "temperature", 1.0)
    scores = score(model, params, batch.inputs, batch.inputs_mask, out, temperature=temperature)
    np.testing.assert_allclose(out.log_probs, scores, atol=1e-5)


def test_bfloat16_models_are_sampled_in_float32():
    model, params = tiny_t5(dtype="bfloat16")
    batch = random_batch(jax.random.key(1), batch_size=2, source=7, target=4, vocab_size=40)
    out = run(
        model,
        params,
        batch.inputs,
        batch.inputs_mask,
        method=Sample(),
        key=jax.random.key(0),
        eos_ids=(),
    )
    assert out.log_probs.dtype == out.weights.dtype == jnp.float32
    # Not on bfloat16's grid.
    rounded = out.log_probs.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != out.log_probs).mean() > 0.5


def test_samples_follow_the_model(history):
    # All pairs of first two tokens of one prompt, against the chain rule in float64.
    model, params = history
    count = 6000
    inputs, mask = prompts([[3, 7, 2]])
    out = run(
        model,
        params,
        inputs,
        mask,
        method=Sample(1.5),
        key=jax.random.key(0),
        num_samples=count,
        max_length=2,
        eos_ids=(),
    )
    size = model.vocab_size
    first = jnp.arange(size)[:, None]
    batch = Batch(
        jnp.repeat(inputs, size, 0),
        jnp.repeat(mask, size, 0),
        jnp.concatenate([first, first], 1),
        jnp.ones((size, 2)),
        jnp.arange(size),
    )
    logits = np.asarray(model.unembed(params, model.hidden_states(params, batch)), np.float64) / 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    joint = (probabilities[0, 0][:, None] * probabilities[:, 1]).ravel()
    counts = np.bincount(out.tokens[:, 0] * size + out.tokens[:, 1], minlength=size * size)
    rare = joint * count < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(joint[~rare], joint[rare].sum()) * count
    assert len(observed) > 20
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_samples_do_not_depend_on_the_batch(history):
    model, params = history
    batch = random_batch(
        jax.random.key(1), batch_size=6, source=5, target=9, vocab_size=23, first_id=100
    )
    sample = functools.partial(
        run,
        model,
        params,
        method=Sample(1.2),
        key=jax.random.key(4),
        max_length=9,
        num_samples=2,
    )
    whole = sample(batch.inputs, batch.inputs_mask, example_id=batch.example_id)
    rows = whole.tokens.reshape(6, 2, 9)
    assert (rows[:, 0] != rows[:, 1]).any(axis=1).all()
    order = np.array([3, 0, 5, 1, 4, 2])
    parts = []
    for part in (order[:3], order[3:]):
        out = sample(batch.inputs[part], batch.inputs_mask[part], example_id=batch.example_id[part])
        parts.append(np.asarray(out.tokens).reshape(-1, 2, 9))
    np.testing.assert_array_equal(np.concatenate(parts), rows[order])


@pytest.mark.pitfall(50)
def test_keys_differ_by_call_example_sample_and_position():
    # One flat distribution everywhere: equal draws would be equal keys.
    params = jnp.zeros((1, 12, 1000))
    inputs, mask = prompts([[0], [0]])
    sample = functools.partial(
        run,
        ScriptedModel(1000),
        params,
        inputs,
        mask,
        method=Sample(),
        num_samples=2,
        eos_ids=(),
    )
    first = np.asarray(sample(key=jax.random.fold_in(jax.random.key(0), 0)).tokens)
    second = np.asarray(sample(key=jax.random.fold_in(jax.random.key(0), 1)).tokens)
    assert len(np.unique(np.concatenate([first, second]))) > 85
    np.testing.assert_array_equal(
        first, sample(key=jax.random.fold_in(jax.random.key(0), 0)).tokens
    )


@pytest.mark.parametrize(
    "method", [Sample(top_p=0.9), pytest.param(BeamSearch(2), marks=pytest.mark.slow)], ids=str
)
def test_sharded_rows_stay_on_their_devices(history, method):
    model, params = history
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = random_batch(jax.random.key(1), batch_size=8, source=5, target=6, vocab_size=23)
    rows = jax.device_put(
        batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    decode_fn = jax.jit(
        functools.partial(decode, model, method=method, max_length=6, eos_ids=(EOS,), pad_id=0)
    )
    key = jax.random.key(0)
    compiled = decode_fn.lower(params, rows.inputs, rows.inputs_mask, key=key).compile()
    # Devices only tell each other whether all outputs have ended.
    program = compiled.as_text()
    assert "all-reduce" in program
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in program
    plain = decode_fn(params, batch.inputs, batch.inputs_mask, key=key)
    sharded = decode_fn(params, rows.inputs, rows.inputs_mask, key=key)
    np.testing.assert_array_equal(plain.tokens, sharded.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_ids": (10,)}, r"eos_ids .* 10 entries; got \(10,\)"),
        ({"pad_id": -1}, "pad_id must lie in the model's vocabulary"),
        ({"length": 0}, "max_length must be at least 1; got 0"),
        ({"num_samples": 2}, r"num_samples must be 1 for Greedy\(\)"),
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"method": Sample()}, "needs a random key"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        run_script([[5]], **settings)
