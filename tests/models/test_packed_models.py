"""Models on packed rows: every example as it is alone, and none sees another."""

import hf_models
import jax
import numpy as np
import packed
import pytest

from gkd_jax.models.ensembles import MixtureModel
from gkd_jax.models.families import model_from_hf
from gkd_jax.models.lora import LoRA
from gkd_jax.models.quantised import Int8
from gkd_jax.models.wrapper import restrict_vocabulary

NAMES = ["t5", "t5_1_1", "llama3", "mistral", "qwen3_yarn", "gemma2", "gemma3_stretched"]


def base(name):
    return model_from_hf(hf_models.make(name).config.to_dict(), dtype="float32")


def wrapped(kind):
    """Models around others, which pass the segments on."""
    t5, gemma = base("t5_1_1"), base("gemma2")
    return {
        "lora": lambda: LoRA(gemma, rank=4, alpha=8.0, base_dtype="float32"),
        "int8": lambda: Int8(t5),
        "restricted": lambda: restrict_vocabulary(gemma, 80),
        "mixture": lambda: MixtureModel((t5, gemma), (1.0, 3.0)),
    }[kind]()


def params_of(model):
    if isinstance(model, Int8):
        return model.quantise(packed.random_params(model.model))
    params = packed.random_params(model)
    if isinstance(model, LoRA):  # As after little training.
        params["adapters"] = jax.tree.map(lambda leaf: 0.2 * leaf, params["adapters"])
    return params


def logits(model, params, batch):
    fn = jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))
    return np.asarray(fn(params, batch))


@pytest.mark.parametrize("name", [*NAMES, "lora", "int8", "restricted", "mixture"])
@pytest.mark.pitfall(20)
def test_an_example_in_a_packed_row_is_what_it_is_alone(name):
    model = base(name) if name in NAMES else wrapped(name)
    params, both = params_of(model), packed.make(80)
    alone = logits(model, params, both.alone)
    together = both.spread(logits(model, params, both.packed))
    counts = both.alone.loss_weights > 0
    assert np.abs(alone[counts]).max() > 0.4
    np.testing.assert_allclose(together[counts], alone[counts], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.pitfall(20)
def test_examples_of_a_row_do_not_see_each_other(name):
    """Whichever example changes, what is predicted of the others stays as it is."""
    model = base(name)
    params = params_of(model)
    hidden_fn = jax.jit(model.hidden_states)
    before = packed.make()
    hidden = before.spread(hidden_fn(params, before.packed))
    for changed in range(len(packed.LENGTHS)):
        after = packed.make(changed=changed)
        moved = after.spread(hidden_fn(params, after.packed)) != hidden
        rows = np.flatnonzero(moved.any(axis=(1, 2)))
        assert rows.tolist() == [changed]


@pytest.mark.parametrize("name", ["t5_1_1", "gemma2"])
def test_what_is_padding_reaches_nothing(name):
    """Neither values nor gradients, whatever stands there."""
    model = base(name)
    params, both = params_of(model), packed.make()
    batch = both.packed
    junk = np.random.default_rng(1).integers(3, 96, batch.inputs.shape).astype(np.int32)
    other = batch.replace(
        inputs=np.where(batch.inputs_segments > 0, batch.inputs, junk),
        targets=np.where(batch.targets_segments > 0, batch.targets, junk[:, : packed.WIDTHS[1]]),
    )

    @jax.jit
    def gradient(params, batch):
        hidden = model.hidden_states(params, batch)
        return jax.grad(
            lambda p: (model.hidden_states(p, batch) * batch.loss_weights[..., None]).sum()
        )(params), hidden

    (left, hidden), (right, same) = gradient(params, batch), gradient(params, other)
    counts = batch.targets_segments > 0
    np.testing.assert_array_equal(np.asarray(hidden)[counts], np.asarray(same)[counts])
    # The embeddings of what stands there get a gradient of 0.
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
