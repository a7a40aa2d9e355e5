"""LoRA: adapters beside a frozen base, for every family by the same few lines."""

import dataclasses

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_runs

from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation import train_step
from gkd_jax.models import lora
from gkd_jax.models.families import model_from_hf
from gkd_jax.models.lora import LoRA
from gkd_jax.models.wrapper import restrict_vocabulary
from gkd_jax.objectives.divergences import GeneralizedJSD
from gkd_jax.objectives.objective import Objective

FAMILIES = ["t5_1_1", "llama3", "gemma2"]


def base(name, dtype="float32"):
    return model_from_hf(hf_models.make(name).config.to_dict(), dtype=dtype)


def adapted(name, *, dtype="float32", base_dtype="float32", **changes):
    return LoRA(base(name, dtype), **dict(rank=4, alpha=8.0, base_dtype=base_dtype) | changes)


def random_params(model):
    """By NumPy: nothing is compiled. Adapters are as after some training, B is not zero."""
    generator = np.random.default_rng(7)

    def one(leaf):
        values = generator.normal(0, leaf.shape[0] ** -0.5, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(one, model.abstract_params())


def logits(model, params, batch):
    return jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))(params, batch)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_leave_the_base_bit_for_bit(name, dtype):
    """B starts at 0; and with the adapters off the base's own arrays are read."""
    model = adapted(name, dtype=dtype, base_dtype=dtype)
    params = random_params(model)
    params["adapters"] = jax.jit(model.init_adapters)(jax.random.key(0))
    batch = hf_models.random_batch()
    ours = np.asarray(logits(model, params, batch))
    assert ours.tobytes() == np.asarray(logits(model.model, params["base"], batch)).tobytes()
    assert {leaf.dtype for leaf in jax.tree.leaves(params["adapters"])} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(params["base"])} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_equals_unmerged(name):
    """Within rounding; in teacher forcing and in cached decoding, which adds them too."""
    model = adapted(name)
    params = random_params(model)
    merged = model.merge(params)
    batch = hf_models.random_batch()
    ours = logits(model, params, batch)
    np.testing.assert_allclose(ours, logits(model.model, merged, batch), atol=2e-5)
    # The adapters matter, or equality would show nothing.
    assert np.max(np.abs(ours - logits(model.model, params["base"], batch))) > 0.05

    @jax.jit
    def decoded(params, batch):
        hidden, state = model.prefill(
            params, batch.inputs, batch.inputs_mask, max_length=batch.targets.shape[1]
        )
        out = [hidden]
        for position in range(3):
            tokens = batch.targets[:, position]
            hidden, state = model.decode_step(params, state, tokens, position)
            out.append(hidden)
        return model.unembed(params, jnp.stack(out, axis=1))

    np.testing.assert_allclose(decoded(params, batch), ours[:, :4], atol=2e-5)


def test_adapters_are_those_of_the_definition():
    """y = x W + alpha / rank (x A) B, by hand, of one product."""
    model = adapted("llama3", targets=("layers_1/mlp/wo",), rank=2, alpha=6.0)
    params = random_params(model)
    assert list(model.kernels) == ["layers_1/mlp/wo"]
    own = params["adapters"]["layers_1"]["mlp"]["wo"]
    assert jax.tree.map(jnp.shape, own) == {"lora_a": (48, 2), "lora_b": (2, 32)}
    kernel = np.asarray(params["base"]["layers_1"]["mlp"]["wo"]["kernel"], np.float64)
    wanted = kernel + 3.0 * np.asarray(own["lora_a"], np.float64) @ np.asarray(own["lora_b"])
    merged = model.merge(params)["layers_1"]["mlp"]["wo"]["kernel"]
    np.testing.assert_allclose(merged, wanted, atol=1e-6)
    start = model.init_adapters(jax.random.key(0))["layers_1"]["mlp"]["wo"]
    assert not np.any(start["lora_b"])
    assert 0.8 < np.max(np.abs(start["lora_a"])) * 48**0.5 <= 1.0


def test_targets_are_ends_of_paths():
    model = base("t5_1_1")

    def paths(*targets):
        return list(LoRA(model, rank=2, targets=targets).kernels)

    assert len(paths("query")) == 2 + 2 * 3  # Of two encoder layers and three decoder layers.
    assert len(paths("self_attention/query")) == 3
    assert len(paths("attention/query")) == 2
    assert len(paths("wi*")) == 2 * 5
    assert paths("encoder/layers_0/mlp/wo") == ["encoder/layers_0/mlp/wo"]
    assert len(paths(*lora.ALL_TARGETS)) == 2 * 7 + 3 * 11
    assert "decoder/logits_dense" not in paths("*")


@pytest.mark.parametrize("name", ["t5_1_1", "llama3"])
def test_a_step_trains_adapters_alone(name):
    """The base is an argument: no gradient, no optimizer state, not a bit of it changed."""
    model = adapted(name, base_dtype="bfloat16")
    params = random_params(model)
    trained, frozen = lora.split(model, params)
    before = jax.tree.map(np.array, frozen)
    optimizer = optax.adamw(1e-2)
    objective = Objective(GeneralizedJSD(beta=0.5))
    step = jax.jit(
        train_step.make_train_step(model, model.model, objective, optimizer, num_microbatches=2),
        donate_argnums=0,
    )
    state = train_step.init_train_state(jax.tree.map(jnp.copy, trained), optimizer)
    shapes = {leaf.shape for leaf in jax.tree.leaves(trained)} | {()}
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} == shapes
    batch = jax.tree.map(jnp.asarray, hf_models.random_batch(rows=4))
    state, metrics = step(state, frozen, batch, jax.random.key(1), frozen)
    assert metrics["grad_norm"][0] > 0
    small_runs.assert_equal_bits(frozen, before)
    assert jax.tree.structure(state.params) == jax.tree.structure(trained)
    for old, new in zip(jax.tree.leaves(trained), jax.tree.leaves(state.params), strict=True):
        assert np.all(np.asarray(old) != np.asarray(new))


def test_gradients_are_those_of_the_merged_kernel():
    """By the chain rule: dA = s dW B^T and dB = s A^T dW, from a model without adapters."""
    model = adapted("llama3")
    params = random_params(model)
    batch = hf_models.random_batch()

    def loss(model, params):
        return jnp.sum(jnp.sin(model.unembed(params, model.hidden_states(params, batch))))

    ours = jax.jit(jax.grad(lambda adapters: loss(model, lora.join(adapters, params["base"]))))(
        params["adapters"]
    )
    whole = jax.jit(jax.grad(lambda merged: loss(model.model, merged)))(model.merge(params))
    for layer, block, name in (("layers_0", "attention", "key"), ("layers_2", "mlp", "wi_1")):
        pair, got = params["adapters"][layer][block][name], ours[layer][block][name]
        kernel = whole[layer][block][name]["kernel"]
        np.testing.assert_allclose(
            got["lora_a"], model.scale * kernel @ pair["lora_b"].T, rtol=1e-3, atol=2e-3
        )
        np.testing.assert_allclose(
            got["lora_b"], model.scale * pair["lora_a"].T @ kernel, rtol=1e-3, atol=2e-3
        )


def test_the_gradient_of_a_frozen_head_is_not_made():
    """The loss in chunks makes it in its own pass; the compiler leaves out what nobody reads."""
    base = small_runs.model(vocab_size=60_000, logits_via_embedding=False)
    model = LoRA(base, rank=2, base_dtype="float32")
    teacher = base
    objective = Objective(GeneralizedJSD(beta=0.5))
    params, teacher_params = model.abstract_params(), teacher.abstract_params()
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, hf_models.random_batch(rows=1)))
    weights = jax.ShapeDtypeStruct(batch.targets.shape, jnp.float32)

    def temporaries(student, trained, frozen):
        gradients = train_step.make_gradient_fn(student, teacher, objective, num_microbatches=1)
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = (
            jax.jit(gradients).lower(trained, teacher_params, batch, weights, key, frozen).compile()
        )
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    head = 16 * 60_000 * 4
    with_adapters = temporaries(model, *lora.split(model, params))
    whole = temporaries(base, base.abstract_params(), None)
    # That of the whole model are those of the head and of the embedding.
    assert whole - with_adapters > 1.9 * head


@pytest.mark.parametrize("rules", ["standard", "fsdp"])
def test_on_a_mesh(rules):
    """A lies as the kernel's inputs do, B as its outputs; the logits are those of one device."""
    model = adapted("llama3")
    partitioner = Partitioner(model_parallelism=2, rules=rules)
    params = random_params(model)
    sharded = jax.device_put(params, partitioner.param_shardings(model))
    wi = sharded["adapters"]["layers_0"]["mlp"]["wi_0"]
    assert tuple(wi["lora_b"].sharding.spec) == (None, "model")
    assert tuple(wi["lora_a"].sharding.spec) == ("data" if rules == "fsdp" else None, None)
    batch = hf_models.random_batch(rows=8)
    function = jax.jit(
        partitioner.annotate(lambda p, b: model.unembed(p, model.hidden_states(p, b)))
    )
    ours = function(sharded, partitioner.shard_batch(batch))
    np.testing.assert_allclose(ours, logits(model, params, batch), atol=2e-5)
    assert lora.fingerprint(sharded["base"]) == lora.fingerprint(params["base"])


def test_a_restricted_model_has_its_parts():
    model = adapted("llama3")
    params = model.abstract_params()
    one = lora.split(restrict_vocabulary(model, 90), params)
    assert one == (params["adapters"], params["base"])
    assert lora.split(model.model, params["base"]) == (params["base"], None)


def test_a_fingerprint_tells_bases_apart():
    params = random_params(adapted("llama3", base_dtype="bfloat16"))["base"]
    told = lora.fingerprint(params)
    assert told == lora.fingerprint(jax.tree.map(jnp.copy, params))
    for change in (lambda x: x[::-1], lambda x: x.at[0, 0].multiply(1.01), lambda x: x.T):
        other = dict(
            params, token_embedder={"embedding": change(params["token_embedder"]["embedding"])}
        )
        assert lora.fingerprint(other) != told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), r"LoRA\.rank must be a whole number from 1 to 16, .*LORA_RANK"),
        (dict(rank=2.0), r"LoRA\.rank must be a whole number"),
        (dict(rank=17), r"LoRA\.rank .* got 17"),
        (dict(alpha=0.0), r"LoRA\.alpha must be a positive number; got 0\.0.*LORA_ALPHA"),
        (dict(targets=()), r"LoRA\.targets must be one or more names"),
        (dict(targets="query"), r"LoRA\.targets must be one or more names in a tuple"),
        (dict(targets=("q_proj",)), r"no product of the model: 'q_proj'.*key, out, query, value"),
        (dict(targets=("logits_dense",)), r"The output layer can have no adapters"),
        (dict(base_dtype="int8"), r"LoRA\.base_dtype must be 'bfloat16' or 'float32'"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        adapted("llama3", **changes)
    with pytest.raises(ValueError, match=r"LoRA\.model has adapters already"):
        LoRA(adapted("llama3"))


def test_a_list_of_targets_is_a_value():
    """As gin gives it; functions jitted for one serve its equal."""
    model = adapted("llama3", targets=["query"])
    assert hash(model) == hash(dataclasses.replace(model, targets=("query",)))
