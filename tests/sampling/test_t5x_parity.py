"""T5X's own decodes of the models it trained, token for token."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.checkpoints.t5x import read_t5x_params
from gkd_jax.common.batch import Batch
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.sampling.beam_search import BeamSearch, beam_search
from gkd_jax.sampling.decode import decode
from gkd_jax.sampling.methods import Greedy, Sample

pytestmark = pytest.mark.usefixtures("fully_compiled")

LENGTH = 10


@pytest.fixture(scope="module", params=["v1_1", "v1_0"])
def t5x(request, external_data):
    """A model that T5X trained, with the inputs and outputs of its decoders."""
    folder = external_data / "t5x_tiny" / request.param
    sizes = json.loads((folder / "meta.json").read_text())["config"]
    sizes["mlp_activations"] = tuple(sizes["mlp_activations"])
    model = T5(T5Config(**sizes))
    params = read_t5x_params(folder / "native" / "checkpoint_2000", model.abstract_params())
    reference = dict(np.load(folder / "reference.npz"))
    inputs = jnp.asarray(reference["encoder_input_tokens"])
    return model, params, inputs, reference


def run(t5x, method, *, eos_ids=(1,), **settings):
    model, params, inputs, _ = t5x
    decode_fn = functools.partial(
        decode,
        model,
        method=method,
        max_length=LENGTH,
        eos_ids=eos_ids,
        pad_id=0,
        chunk_size=4,
        **settings,
    )
    return jax.jit(decode_fn)(params, inputs, inputs > 0)


def score(t5x, tokens):
    """Log-probabilities of given tokens by a teacher-forced pass."""
    model, params, inputs, _ = t5x
    inputs = jnp.repeat(inputs, tokens.shape[0] // inputs.shape[0], axis=0)
    batch = Batch(inputs, inputs > 0, tokens, jnp.ones(tokens.shape), jnp.arange(len(inputs)))
    logits = score_fn(model)(params, batch)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    return np.take_along_axis(log_probs, np.asarray(tokens)[..., None], -1)[..., 0]


@functools.cache
def score_fn(model):
    return jax.jit(lambda params, batch: model.unembed(params, model.hidden_states(params, batch)))


def test_greedy_equals_t5x(t5x):
    out = run(t5x, Greedy())
    np.testing.assert_array_equal(out.tokens, t5x[3]["greedy"])
    assert (out.lengths == (t5x[3]["greedy"] == 1).argmax(1) + 1).all()


def test_greedy_without_end_equals_t5x(t5x):
    out = run(t5x, Greedy(), eos_ids=())
    np.testing.assert_array_equal(out.tokens, t5x[3]["greedy_noeos"])
    assert out.weights.all()


def test_all_beams_equal_t5x_with_their_scores(t5x):
    model, params, inputs, reference = t5x
    search = functools.partial(
        beam_search,
        model,
        method=BeamSearch(num_beams=4, alpha=0.6),
        max_length=LENGTH,
        eos_ids=(1,),
        pad_id=0,
    )
    beams = jax.jit(search)(params, inputs, inputs > 0)
    # T5X sorts beams worst first.
    np.testing.assert_array_equal(beams.tokens[:, ::-1], reference["beam4"])
    np.testing.assert_allclose(beams.scores[:, ::-1], reference["beam4_scores"], atol=1e-5)


def test_log_probs_of_samples_equal_scoring(t5x):
    out = run(t5x, Sample(), num_samples=4, key=jax.random.key(0))
    log_probs = score(t5x, out.tokens)
    np.testing.assert_allclose(out.log_probs, log_probs * out.weights, atol=1e-5)


def test_scores_of_t5x_samples(t5x):
    tokens = t5x[3]["sample4"].reshape(-1, LENGTH)
    until_end = np.cumsum(tokens == 1, axis=1) - (tokens == 1) == 0
    scores = (score(t5x, jnp.asarray(tokens)) * until_end).sum(axis=1)
    np.testing.assert_allclose(scores, t5x[3]["sample4_scores"].reshape(-1), rtol=1e-5, atol=1e-5)
