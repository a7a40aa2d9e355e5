"""T5 against an independent float64 implementation, and what must hold for any parameters."""

import dataclasses
import functools
import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.sharding import PartitionSpec

from gkd_jax.common.batch import Batch
from gkd_jax.models import layers, sizes
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config


def _load_reference():
    path = pathlib.Path(__file__).with_name("t5_reference.py")
    spec = importlib.util.spec_from_file_location("t5_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load_reference()

V1_1 = T5Config(
    vocab_size=41,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=6,
    mlp_dim=24,
    dtype="float32",
)
V1_0 = dataclasses.replace(V1_1, mlp_activations=("relu",), logits_via_embedding=True)
# For what does not depend on depth: compiling is what these tests spend their time on.
SHALLOW = dataclasses.replace(V1_1, num_encoder_layers=1, num_decoder_layers=1)
VARIANTS = pytest.mark.parametrize("config", [V1_1, V1_0], ids=["v1_1", "v1_0"])


@functools.cache
def make_params(model):
    """Parameters of which none is special: norms' scales are not all one."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise * leaf.shape[0] ** -0.5 if noise.ndim == 2 else 1 + noise / 5)

    params = jax.tree.map(draw, model.abstract_params())
    params["token_embedder"]["embedding"] *= model.vocab_size**0.5
    return params


def make_batch(*, input_lengths=(7, 3, 9), source_length=9, target_length=24, seed=0):
    rng = np.random.default_rng(seed)
    rows = len(input_lengths)
    mask = np.arange(source_length)[None] < np.array(input_lengths)[:, None]
    # Token 0 is a token like any other: it appears in prompts and outputs, and as padding.
    inputs = np.where(mask, rng.integers(0, 41, (rows, source_length)), 0)
    targets = rng.integers(0, 41, (rows, target_length))
    targets[:, 2] = 0
    return Batch(
        inputs=jnp.asarray(inputs, jnp.int32),
        inputs_mask=jnp.asarray(mask),
        targets=jnp.asarray(targets, jnp.int32),
        loss_weights=jnp.ones((rows, target_length)),
        example_id=jnp.arange(rows),
    )


@functools.cache
def make_logits_fn(model):
    return jax.jit(lambda params, batch: model.unembed(params, model.hidden_states(params, batch)))


@functools.partial(jax.jit, static_argnums=0)
def decode_teacher_forced(model, params, inputs, inputs_mask, targets):
    """Logits [B, T, V] from the cache, fed with `targets`."""
    length = targets.shape[1]
    hidden, state = model.prefill(params, inputs, inputs_mask, max_length=length)

    def step(carry, fed):
        state, _ = carry
        index, tokens = fed
        hidden, state = model.decode_step(params, state, tokens, index)
        return (state, hidden), hidden

    fed = (jnp.arange(length - 1), targets[:, :-1].T)
    _, later = jax.lax.scan(step, (state, hidden), fed)
    all_hidden = jnp.concatenate([hidden[None], later]).swapaxes(0, 1)
    return model.unembed(params, all_hidden)


@VARIANTS
def test_logits_equal_float64_reference(config):
    model, batch = T5(config), make_batch()
    params = make_params(model)
    expected = reference.logits(
        jax.tree.map(lambda x: np.asarray(x, np.float64), params),
        config,
        np.asarray(batch.inputs),
        np.asarray(batch.inputs_mask),
        np.asarray(batch.targets),
    )
    logits = make_logits_fn(model)(params, batch)
    assert logits.shape == (3, 24, 41)
    assert 0.3 < np.std(expected) < 3
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_position_buckets_equal_exact_arithmetic(bidirectional):
    distances = np.arange(-700, 700)
    expected = [reference.bucket(int(d), bidirectional=bidirectional) for d in distances]
    buckets = layers.relative_position_buckets(distances, bidirectional=bidirectional)
    np.testing.assert_array_equal(buckets, expected)
    assert set(expected) == set(range(32)) - ({16} if bidirectional else set())


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 5), (5, 1), (40, 40), (3, 7), (7, 3)])
def test_position_bias_of_all_pairs(bidirectional, lengths):
    query_length, key_length = lengths
    module = layers.RelativePositionBias(2, bidirectional)
    table = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    variables = {"params": {"rel_embedding": jnp.asarray(table)}}
    bias = jax.jit(module.apply, static_argnums=(1, 2))(variables, query_length, key_length)
    for query in range(query_length):
        for key in range(key_length):
            column = reference.bucket(key - query, bidirectional=bidirectional)
            np.testing.assert_array_equal(bias[0, :, query, key], table[:, column])


@VARIANTS
def test_cached_decoding_equals_teacher_forcing(config):
    """For prompts of unequal length, one of them without padding, and tokens 0 in outputs."""
    model, batch = T5(config), make_batch()
    assert list(batch.inputs_mask.sum(axis=1)) == [7, 3, batch.inputs.shape[1]]
    assert (batch.targets[:, 2] == 0).all()
    params = make_params(model)
    expected = make_logits_fn(model)(params, batch)
    decoded = decode_teacher_forced(model, params, batch.inputs, batch.inputs_mask, batch.targets)
    np.testing.assert_allclose(decoded, expected, atol=1e-5, rtol=0)


def test_cached_decoding_in_bfloat16_equals_teacher_forcing():
    model, batch = T5(dataclasses.replace(SHALLOW, dtype="bfloat16")), make_batch()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(model))
    prefill = functools.partial(model.prefill, max_length=3)
    _, state = jax.eval_shape(prefill, params, batch.inputs, batch.inputs_mask)
    assert {x.dtype for x in jax.tree.leaves(state)} == {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(bool),
    }
    expected = make_logits_fn(model)(params, batch)
    decoded = decode_teacher_forced(model, params, batch.inputs, batch.inputs_mask, batch.targets)
    assert expected.dtype == decoded.dtype == jnp.float32
    # One unit in the last place of bfloat16 at the hidden states' size, summed over D.
    np.testing.assert_allclose(decoded, expected, atol=0.1, rtol=0)
    assert np.abs(decoded - expected).mean() < 0.01


def test_decode_state_rows_can_be_gathered():
    """Samplers repeat and reorder rows of the state: the batch is every leaf's first axis."""
    model, batch = T5(SHALLOW), make_batch()
    params = make_params(model)
    prefill = jax.jit(functools.partial(model.prefill, max_length=5))
    decode_step = jax.jit(model.decode_step)
    rows, tokens = jnp.array([2, 0, 0]), jnp.array([5, 6, 7])
    _, state = prefill(params, batch.inputs, batch.inputs_mask)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(state))
    gathered = jax.tree.map(lambda x: x[rows], state)
    hidden, _ = decode_step(params, gathered, tokens, 0)
    _, state = prefill(params, batch.inputs[rows], batch.inputs_mask[rows])
    expected, _ = decode_step(params, state, tokens, 0)
    np.testing.assert_allclose(hidden, expected, atol=1e-6, rtol=0)
    assert np.abs(hidden[1] - hidden[2]).max() > 1e-3


def test_prefill_needs_room_for_one_token():
    model, batch = T5(V1_1), make_batch()
    params = make_params(model)
    with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
        model.prefill(params, batch.inputs, batch.inputs_mask, max_length=0)
    prefill = functools.partial(model.prefill, max_length=1)
    hidden, _ = jax.jit(prefill)(params, batch.inputs, batch.inputs_mask)
    expected = make_logits_fn(model)(params, batch)[:, 0]
    np.testing.assert_allclose(model.unembed(params, hidden), expected, atol=1e-5, rtol=0)


@pytest.mark.pitfall(14)
@pytest.mark.pitfall(51)
@VARIANTS
@pytest.mark.parametrize("position", [0, 5, 22, 23])
def test_causal_shift(config, position):
    """Target t is predicted at position t and read from t + 1 on, never before."""
    model, batch = T5(config), make_batch()
    params, logits_fn = make_params(model), make_logits_fn(model)
    before = logits_fn(params, batch)
    targets = batch.targets.at[:, position].set((batch.targets[:, position] + 7) % 41)
    after = logits_fn(params, batch.replace(targets=targets))
    changed = np.abs(after - before).max(axis=-1)
    assert (changed[:, : position + 1] == 0).all()
    assert (changed[:, position + 1 :] > 1e-5).all()


@pytest.mark.pitfall(21)
@VARIANTS
@pytest.mark.parametrize(("padding_id", "left"), [(0, 0), (13, 0), (0, 3), (13, 2)])
def test_padded_inputs_do_not_change_logits(config, padding_id, left):
    """On either side: distances between the tokens stay what they are."""
    model = T5(config)
    params, logits_fn = make_params(model), make_logits_fn(model)
    batch = make_batch(input_lengths=(6, 6, 6), source_length=6)
    padding = ((0, 0), (left, 3 - left))  # To the shape that other tests have compiled.
    padded = batch.replace(
        inputs=jnp.pad(batch.inputs, padding, constant_values=padding_id),
        inputs_mask=jnp.pad(batch.inputs_mask, padding),
    )
    np.testing.assert_allclose(
        logits_fn(params, padded), logits_fn(params, batch), atol=1e-5, rtol=0
    )


def test_a_prompt_without_tokens_gives_finite_logits_and_gradients():
    """A filler row that completes a last batch must not spoil the gradient with NaN."""
    model, batch = T5(SHALLOW), make_batch(input_lengths=(4, 0, 9), target_length=3)
    logits_fn = make_logits_fn(model)
    gradient = jax.jit(jax.grad(lambda p: logits_fn(p, batch)[0].sum()))(make_params(model))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_dropout_follows_its_key():
    silent, model = T5(SHALLOW), T5(dataclasses.replace(SHALLOW, dropout_rate=0.2))
    batch = make_batch(target_length=6)
    params, hidden_fn = make_params(silent), jax.jit(model.hidden_states)
    off = hidden_fn(params, batch)
    first = hidden_fn(params, batch, dropout_key=jax.random.key(0))
    again = hidden_fn(params, batch, dropout_key=jax.random.key(0))
    second = hidden_fn(params, batch, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.1
    assert np.abs(first - off).max() > 0.1
    # Off is off: the logits are those of a model that has no dropout.
    without = make_logits_fn(silent)(params, batch)
    np.testing.assert_allclose(model.unembed(params, off), without, atol=1e-5, rtol=0)
    # The last dropout zeroes features of a whole sequence, one in five of them.
    dropped = np.asarray(first == 0)
    np.testing.assert_array_equal(dropped.all(axis=1), dropped.any(axis=1))
    assert 0.05 < dropped.mean() < 0.4
    encoded = jax.jit(model.encode)(
        params, batch.inputs, batch.inputs_mask, dropout_key=jax.random.key(0)
    )
    zeros = np.asarray(encoded == 0)
    assert (zeros.any(axis=1) & ~zeros.all(axis=1)).any()


def test_attention_dropout_keeps_the_mean():
    module = layers.Attention(2, 6, 16, 0.25, "float32")
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    bias = jnp.zeros((1, 1, 5, 5))

    def apply(module, x):
        keys, values = module.keys_values(x)
        return module(x, keys, values, bias)

    params = make_params(T5(V1_1))["encoder"]["layers_0"]["attention"]
    variables = {"params": params}
    outputs = jax.jit(
        jax.vmap(lambda key: module.apply(variables, x, rngs={"dropout": key}, method=apply))
    )(jax.random.split(jax.random.key(3), 4000))
    silent = layers.Attention(2, 6, 16, 0.0, "float32")
    expected = silent.apply(variables, x, method=apply)
    error = np.abs(outputs.mean(axis=0) - expected).max()
    assert error < 5 * outputs.std() / math.sqrt(4000)
    assert outputs.std(axis=0).min() > 1e-3


@VARIANTS
def test_bfloat16_compute_keeps_float32_logits(config):
    batch = make_batch()
    exact, half = T5(config), T5(dataclasses.replace(config, dtype="bfloat16"))
    params = make_params(exact)
    expected = make_logits_fn(exact)(params, batch)
    assert jax.eval_shape(half.hidden_states, params, batch).dtype == jnp.bfloat16
    logits = make_logits_fn(half)(params, batch)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected)
    assert 1e-4 < error.mean() < 0.03 * np.std(expected)
    # Logits that were rounded to bfloat16 would be unchanged by rounding them again.
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert (np.asarray(rounded) != np.asarray(logits)).mean() > 0.9


@VARIANTS
def test_bfloat16_parameters_unembed_exactly(config):
    """A teacher's bfloat16 head gives what the same numbers in float32 give."""
    model = T5(dataclasses.replace(config, dtype="bfloat16"))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(model))
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 16)).astype(jnp.bfloat16)
    logits = jax.jit(model.unembed)(params, hidden)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected = jax.jit(model.unembed)(widened, hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


@VARIANTS
def test_unembed_of_a_slice_of_the_vocabulary(config):
    model = T5(config)
    params = make_params(model)
    hidden = jax.random.normal(jax.random.key(0), (4, 16))
    flat = traverse_util.flatten_dict(params)
    name = ("token_embedder", "embedding")
    if config.logits_via_embedding:
        flat[name] = flat[name][10:20]
    else:
        name = ("decoder", "logits_dense", "kernel")
        flat[name] = flat[name][:, 10:20]
    part = model.unembed(traverse_util.unflatten_dict({name: flat[name]}), hidden)
    np.testing.assert_allclose(part, model.unembed(params, hidden)[:, 10:20], atol=1e-6, rtol=0)


def test_initialisers():
    """T5X's: attention is not scaled, so the query's initialiser carries 1/sqrt(head_dim)."""
    config = dataclasses.replace(
        V1_1, vocab_size=512, emb_dim=256, head_dim=64, num_heads=4, mlp_dim=512
    )
    params = jax.jit(T5(config).init)(jax.random.key(0))
    flat = traverse_util.flatten_dict(params, sep="/")
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype(jnp.float32)}
    expected = {
        "token_embedder/embedding": 1.0,
        "encoder/layers_0/attention/query/kernel": 256**-0.5 * 64**-0.5,
        "encoder/layers_0/attention/key/kernel": 256**-0.5,
        "decoder/layers_1/encoder_decoder_attention/value/kernel": 256**-0.5,
        "decoder/layers_1/self_attention/out/kernel": 256**-0.5,
        "encoder/layers_1/mlp/wi_0/kernel": 256**-0.5,
        "encoder/layers_1/mlp/wo/kernel": 512**-0.5,
        "decoder/logits_dense/kernel": 256**-0.5,
    }
    for name, deviation in expected.items():
        np.testing.assert_allclose(np.std(flat[name]), deviation, rtol=0.02, err_msg=name)
    # Truncated at two deviations of the untruncated normal, as flax scales it, or not at all.
    assert np.abs(flat["encoder/layers_1/mlp/wo/kernel"]).max() < 2.3 * 512**-0.5
    assert np.abs(flat["encoder/layers_0/attention/key/kernel"]).max() > 3 * 256**-0.5
    table = flat["decoder/relpos_bias/rel_embedding"]
    limit = math.sqrt(3 / ((4 + 32) / 2))
    assert 0.9 * limit < np.abs(table).max() <= limit
    np.testing.assert_array_equal(flat["encoder/encoder_norm/scale"], 1.0)
    assert not np.array_equal(
        flat["encoder/layers_0/attention/key/kernel"],
        flat["encoder/layers_1/attention/key/kernel"],
    )


@VARIANTS
def test_abstract_params_and_logical_axes(config):
    model = T5(config)
    abstract = model.abstract_params()
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype(jnp.float32)}
    axes = traverse_util.flatten_dict(model.logical_axes(), sep="/")
    shapes = traverse_util.flatten_dict(abstract, sep="/")
    assert axes.keys() == shapes.keys()
    sizes_of = {
        "vocab": 41,
        "embed": 16,
        "joined_kv": 12,
        "mlp": 24,
        "heads": 2,
        "relpos_buckets": 32,
    }
    for name, spec in axes.items():
        assert shapes[name].shape == tuple(sizes_of[axis] for axis in spec), name


def test_model_is_hashable_so_that_jit_can_take_it():
    assert hash(T5(V1_1)) == hash(T5(dataclasses.replace(V1_1)))
    assert T5(V1_1) != T5(V1_0)
    assert T5(V1_1).vocab_size == 41


def test_logical_constraints_apply_under_a_mesh_and_keep_the_logits():
    model, batch = T5(V1_1), make_batch(input_lengths=(7, 3, 9, 5), target_length=4)
    params = make_params(model)
    expected = make_logits_fn(model)(params, batch)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    rules = (("batch", "data"), ("mlp", "model"), ("heads", "model"))

    def logits_fn(params, batch):
        return model.unembed(params, model.hidden_states(params, batch))

    assert "sharding_constraint" not in str(jax.make_jaxpr(logits_fn)(params, batch))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
        assert "sharding_constraint" in str(jax.make_jaxpr(logits_fn)(params, batch))
        batch = jax.device_put(batch, jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
        logits = jax.jit(logits_fn)(params, batch)
    assert not logits.is_fully_replicated
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


# Parameter counts of the released models.
COUNTS = {
    "t5_1_0-small": 60_506_624,
    "t5_1_0-base": 222_903_552,
    "t5_1_0-large": 737_668_096,
    "t5_1_0-3b": 2_851_598_336,
    "t5_1_0-11b": 11_307_321_344,
    "t5_1_1-small": 76_961_152,
    "t5_1_1-base": 247_577_856,
    "t5_1_1-large": 783_150_080,
    "t5_1_1-xl": 2_849_757_184,
    "t5_1_1-xxl": 11_135_332_352,
}
LARGE = ("t5_1_0-large", "t5_1_0-3b", "t5_1_0-11b", "t5_1_1-large", "t5_1_1-xl", "t5_1_1-xxl")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in sizes.T5_NAMES],
)
def test_sizes_have_the_released_parameter_counts(name):
    model = T5(sizes.t5_config(name))
    leaves = jax.tree.leaves(model.abstract_params())
    assert sum(math.prod(leaf.shape) for leaf in leaves) == COUNTS[name]
    assert model.vocab_size == 32_128


def test_unknown_size_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"got 't5-xl'.*t5_1_0-small.*t5_1_1-xxl"):
        sizes.t5_config("t5-xl")


def test_size_settings_reach_the_config():
    config = sizes.t5_config("t5_1_0-small", vocab_size=100, dropout_rate=0.1, dtype="float32")
    assert (config.vocab_size, config.dropout_rate, config.dtype) == (100, 0.1, "float32")
    assert config.mlp_activations == ("relu",)
    assert config.logits_via_embedding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1; got 0"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16; got 'float16'"),
        ({"mlp_activations": ("tanh",)}, "mlp_activations must be"),
        ({"mlp_activations": ()}, "mlp_activations must be"),
        ({"dropout_rate": 1.0}, "dropout_rate must be at least 0 and below 1; got 1.0"),
        ({"decoder_start_id": 41}, r"decoder_start_id must be an id below vocab_size \(41\)"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(V1_1, **changes)


def test_ids_outside_of_the_vocabulary_do_not_pass_unseen():
    model, batch = T5(V1_1), make_batch()
    params = make_params(model)
    wrong = batch.replace(targets=batch.targets.at[0, 3].set(41))
    logits = make_logits_fn(model)(params, wrong)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1:]).all()


def test_decoder_start_id_is_fed_first():
    batch = make_batch()
    other = dataclasses.replace(V1_1, decoder_start_id=5)
    params = make_params(T5(V1_1))
    expected = reference.logits(
        jax.tree.map(lambda x: np.asarray(x, np.float64), params),
        other,
        np.asarray(batch.inputs),
        np.asarray(batch.inputs_mask),
        np.asarray(batch.targets),
    )
    logits = make_logits_fn(T5(other))(params, batch)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
    prefill = jax.jit(functools.partial(T5(other).prefill, max_length=1))
    hidden, _ = prefill(params, batch.inputs, batch.inputs_mask)
    first = T5(other).unembed(params, hidden)
    np.testing.assert_allclose(first, expected[:, 0], atol=1e-5, rtol=0)
    assert np.abs(make_logits_fn(T5(V1_1))(params, batch) - logits).max() > 1e-3
