"""Combined models against NumPy: their distributions, and what decoding from them gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from gkd_jax.common.batch import Batch
from gkd_jax.models.ensembles import CorrectedModel, MixtureModel
from gkd_jax.sampling.decode import decode
from gkd_jax.sampling.methods import Greedy, Sample

WIDTHS = (16, 24)


@pytest.fixture(scope="module")
def models():
    return tuple(small_runs.model(width) for width in WIDTHS)


@pytest.fixture(scope="module")
def params(models):
    # Larger than at the start of training, so that distributions are far from uniform.
    made = tuple(model.init(jax.random.key(i)) for i, model in enumerate(models))
    return jax.tree.map(lambda leaf: 3 * leaf, made)


def make_batch(vocab_size: int) -> Batch:
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.integers(3, vocab_size, (3, 5)), jnp.int32)
    targets = jnp.asarray(generator.integers(3, vocab_size, (3, 4)), jnp.int32)
    return Batch(
        inputs=inputs,
        inputs_mask=jnp.arange(5)[None] < jnp.array([[5], [3], [4]]),
        targets=targets,
        loss_weights=jnp.ones((3, 4)),
        example_id=jnp.arange(3),
    )


def probabilities(models, params, batch) -> list[np.ndarray]:
    """Each part's distributions, in float64."""
    results = []
    for model, own in zip(models, params, strict=True):
        logits = model.unembed(own, model.hidden_states(own, batch))
        logits = np.asarray(logits, np.float64)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        results.append(probs / probs.sum(-1, keepdims=True))
    return results


def combined_probabilities(model, params, batch) -> np.ndarray:
    hidden = model.hidden_states(params, batch)
    assert hidden.shape[-1] == model.hidden_size
    return np.exp(np.asarray(model.unembed(model.head(params), hidden), np.float64))


def test_mixture_is_the_weighted_sum_of_distributions(models, params):
    model = MixtureModel(models, weights=(1, 3))
    batch = make_batch(model.vocab_size)
    first, second = probabilities(models, params, batch)
    got = combined_probabilities(model, params, batch)
    np.testing.assert_allclose(got, 0.25 * first + 0.75 * second, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("top_k", [1, 7])
def test_corrected_tokens_have_the_methods_probabilities(models, params, top_k):
    model = CorrectedModel(models, top_k=top_k)
    batch = make_batch(model.vocab_size)
    student, teacher = probabilities(models, params, batch)
    best = np.argsort(-teacher, axis=-1)[..., :top_k]
    accepted = np.zeros_like(student)
    np.put_along_axis(accepted, best, np.take_along_axis(student, best, -1), -1)
    expected = accepted + (1 - accepted.sum(-1, keepdims=True)) * teacher
    got = combined_probabilities(model, params, batch)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


def test_corrected_by_the_whole_vocabulary_is_the_student(models, params):
    model = CorrectedModel(models, top_k=models[0].vocab_size)
    batch = make_batch(model.vocab_size)
    student, _ = probabilities(models, params, batch)
    got = combined_probabilities(model, params, batch)
    np.testing.assert_allclose(got, student, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("method", [Greedy(), Sample()])
def test_decoding_equals_scoring(models, params, method):
    model = MixtureModel(models, weights=(0.5, 0.5))
    batch = make_batch(model.vocab_size)
    decoded = decode(
        model,
        params,
        batch.inputs,
        batch.inputs_mask,
        method=method,
        max_length=6,
        eos_ids=(1,),
        pad_id=0,
        key=jax.random.key(1),
    )
    scored = Batch(batch.inputs, batch.inputs_mask, decoded.tokens, decoded.weights, jnp.arange(3))
    log_probs = model.unembed(params, model.hidden_states(params, scored))
    of_tokens = np.take_along_axis(np.asarray(log_probs), decoded.tokens[..., None], -1)[..., 0]
    counts = np.asarray(decoded.weights) > 0
    np.testing.assert_allclose(
        np.asarray(decoded.log_probs)[counts], of_tokens[counts], rtol=1e-4, atol=1e-5
    )


def test_settings_out_of_range_are_refused(models):
    with pytest.raises(ValueError, match=r"MixtureModel.weights must be 2 positive numbers"):
        MixtureModel(models, weights=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"models is empty"):
        MixtureModel((), weights=())
    with pytest.raises(ValueError, match=r"CorrectedModel.models must be student and teacher"):
        CorrectedModel(models[:1])
    with pytest.raises(ValueError, match=r"CorrectedModel.top_k must be from 1"):
        CorrectedModel(models, top_k=0)
