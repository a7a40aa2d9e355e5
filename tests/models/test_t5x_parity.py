"""Our T5 is T5X's T5: the logits, losses and decodes that T5X itself computed."""

import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gkd_jax.checkpoints.t5x import read_t5x_params
from gkd_jax.common.batch import Batch
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config

pytestmark = pytest.mark.usefixtures("fully_compiled")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model that T5X trained, and what T5X computed with it."""

    model: T5
    params: dict
    batch: Batch
    arrays: dict
    meta: dict

    @property
    def counted(self):
        return np.asarray(self.batch.loss_weights) > 0


@pytest.fixture(scope="module", params=["v1_1", "v1_0"])
def case(request, external_data):
    folder = external_data / "t5x_tiny" / request.param
    meta = json.loads((folder / "meta.json").read_text())
    arrays = dict(np.load(folder / "reference.npz"))
    model = T5(T5Config(**meta["config"]))
    batch = Batch(
        inputs=jnp.asarray(arrays["encoder_input_tokens"]),
        inputs_mask=jnp.asarray(arrays["encoder_input_tokens"] > 0),
        targets=jnp.asarray(arrays["decoder_target_tokens"]),
        loss_weights=jnp.asarray(arrays["decoder_loss_weights"]),
        example_id=jnp.arange(6),
    )
    params = read_t5x_params(folder / "native", model.abstract_params())
    return Case(model, params, batch, arrays, meta)


@functools.cache
def logits_fn(model):
    return jax.jit(lambda params, batch: model.unembed(params, model.hidden_states(params, batch)))


def _load_reference():
    path = pathlib.Path(__file__).with_name("t5_reference.py")
    spec = importlib.util.spec_from_file_location("t5_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parameter_tree_is_t5x(case):
    flat = traverse_util.flatten_dict(case.model.abstract_params(), sep="/")
    tree = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in flat.items()}
    assert tree == case.meta["params"]


def test_logical_axes_are_t5x(case):
    """Under T5X's rules they give the mesh axes that T5X used."""
    rules = {"vocab": "model", "joined_kv": "model", "mlp": "model", "heads": "model"}
    flat = traverse_util.flatten_dict(case.model.logical_axes(), sep="/")
    # As T5X prints them: P('model', None), and P(None,) of one axis.
    printed = {name: f"P{tuple(rules.get(axis) for axis in spec)}" for name, spec in flat.items()}
    assert printed == case.meta["mesh_axes"]


def test_encoder_output(case):
    """Padded positions included."""
    encoded = jax.jit(case.model.encode)(case.params, case.batch.inputs, case.batch.inputs_mask)
    np.testing.assert_allclose(encoded, case.arrays["encoded"], atol=1e-5, rtol=0)


def test_logits(case):
    """Equal up to float32's rounding.

    T5X's own logits, of size up to 18, are 1.2e-5 from the float64 values. Ours are to be
    within 1e-6 of the largest logit of T5X's, and about as near as T5X's to float64.
    """
    logits = logits_fn(case.model)(case.params, case.batch)[case.counted]
    expected = case.arrays["logits"][case.counted]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=1e-6 * scale, rtol=0)
    exact = _load_reference().logits(
        jax.tree.map(lambda x: np.asarray(x, np.float64), case.params),
        case.model.config,
        np.asarray(case.batch.inputs),
        np.asarray(case.batch.inputs_mask),
        np.asarray(case.batch.targets),
    )[case.counted]
    error, t5x_error = np.abs(logits - exact), np.abs(expected - exact)
    assert t5x_error.max() < 1.5e-5
    assert error.mean() < 1.5 * t5x_error.mean()
    assert error.max() < 2 * t5x_error.max()


def test_loss_and_sequence_scores(case):
    logits = logits_fn(case.model)(case.params, case.batch)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, case.batch.targets[..., None], axis=-1)[..., 0]
    log_probs = chosen - log_z
    weights = case.batch.loss_weights
    loss = jnp.sum(weights * (case.meta["z_loss"] * log_z**2 - log_probs))
    np.testing.assert_allclose(loss, case.arrays["loss"], rtol=1e-6)
    scores = jnp.sum(weights * log_probs, axis=-1)
    np.testing.assert_allclose(scores, case.arrays["score_batch"], rtol=2e-6, atol=2e-5)


def test_logits_in_bfloat16(case):
    """No further from float32 than T5X's bfloat16 logits are, and truly computed in bfloat16."""
    half = T5(dataclasses.replace(case.model.config, dtype="bfloat16"))
    logits = logits_fn(half)(case.params, case.batch)[case.counted]
    exact = case.arrays["logits"][case.counted]
    t5x_half = case.arrays["logits_bf16"][case.counted]
    assert logits.dtype == jnp.float32
    error, t5x_error = np.abs(logits - exact).mean(), np.abs(t5x_half - exact).mean()
    assert 0.3 * t5x_error < error < 1.25 * t5x_error
    assert np.abs(logits - t5x_half).mean() < 1.5 * t5x_error


@functools.partial(jax.jit, static_argnums=0)
def greedy_decode(model, params, inputs, inputs_mask):
    length = 10
    hidden, state = model.prefill(params, inputs, inputs_mask, max_length=length)

    def step(carry, index):
        hidden, state = carry
        logits = model.unembed(params, hidden)
        tokens = jnp.argmax(logits, axis=-1)
        return model.decode_step(params, state, tokens, index), (tokens, logits)

    _, (tokens, logits) = jax.lax.scan(step, (hidden, state), jnp.arange(length))
    return tokens.T, logits.swapaxes(0, 1)


def test_greedy_decoding(case):
    inputs, mask = case.batch.inputs, case.batch.inputs_mask
    tokens, logits = greedy_decode(case.model, case.params, inputs, mask)
    np.testing.assert_array_equal(tokens, case.arrays["greedy_noeos"])
    scores = jax.nn.log_softmax(logits).max(axis=-1).sum(axis=-1)
    np.testing.assert_allclose(scores, case.arrays["greedy_noeos_scores"], atol=2e-5, rtol=2e-6)
    # T5X's eos is 1, and 0 follows it.
    ended = np.cumsum(np.asarray(tokens) == 1, axis=1) - (np.asarray(tokens) == 1) > 0
    np.testing.assert_array_equal(np.where(ended, 0, tokens), case.arrays["greedy"])


def test_cached_logits_of_trained_parameters(case):
    """Feeding back what was decoded gives the logits of the cache, tokens 0 included."""
    inputs, mask = case.batch.inputs, case.batch.inputs_mask
    tokens, logits = greedy_decode(case.model, case.params, inputs, mask)
    forced = logits_fn(case.model)(case.params, case.batch.replace(targets=tokens))
    scale = np.abs(logits).max()
    np.testing.assert_allclose(forced, logits, atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("variant", ["v1_1", "v1_0"])
def test_native_and_orbax_hold_the_same_parameters(external_data, variant):
    folder = external_data / "t5x_tiny" / variant
    config = T5Config(**json.loads((folder / "meta.json").read_text())["config"])
    abstract = T5(config).abstract_params()
    native = read_t5x_params(folder / "native", abstract)
    orbax = read_t5x_params(folder / "orbax", abstract)
    jax.tree.map(np.testing.assert_array_equal, native, orbax)
