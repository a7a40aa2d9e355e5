"""Layers as one loop with stacked parameters, and rematerialised: the numbers of one by one."""

import dataclasses

import chex
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.models import stacking
from gkd_jax.models.families import model_from_hf
from gkd_jax.models.lora import LoRA
from gkd_jax.models.quantised import Int8

FAMILIES = ["t5", "t5_1_1", "llama3", "gemma2", "gemma3", "qwen3", "smollm3"]
POLICIES = ["minimal", "full"]


def family(name, **changes):
    # More layers than one period of Gemma 3's kinds.
    config = hf_models.make(name).config.to_dict()
    return model_from_hf(config, dtype="float32", **changes)


def scanned(model, **changes):
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, scan_layers=True, **changes)
    )


def random_params(model):
    generator = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(0, 0.2, leaf.shape), leaf.dtype),
        model.abstract_params(),
    )


def value_and_grad(model, params, batch):
    def loss(params):
        logits = model.unembed(params, model.hidden_states(params, batch))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
        return -jnp.sum(picked[..., 0] * batch.loss_weights)

    return jax.jit(jax.value_and_grad(loss))(params)


def is_spec(value):
    return isinstance(value, jax.sharding.PartitionSpec)


def assert_close(one, other, tolerance=1e-5):
    """Of each array, to a share of its largest entry."""

    def check(left, right):
        limit = tolerance * max(float(jnp.max(jnp.abs(left))), 1e-6)
        np.testing.assert_allclose(left, right, rtol=0, atol=limit)

    jax.tree.map(check, one, other)


def test_stacking_is_undone():
    rng = np.random.default_rng(0)

    def layer():
        wo, scale = rng.random((2, 3), np.float32), rng.random(2, np.float32)
        return {"mlp": {"wo": wo}, "scale": scale}

    tree = {
        "decoder": {f"layers_{n}": layer() for n in range(12)} | {"norm": np.ones(2, np.float32)},
        "token_embedder": {"embedding": np.ones((5, 2), np.float32)},
    }
    stacked = stacking.stack(tree)
    # By number: as text, layer 10 would come before layer 2.
    np.testing.assert_array_equal(
        stacked["decoder"]["layers"]["scale"][10], tree["decoder"]["layers_10"]["scale"]
    )
    chex.assert_trees_all_equal(stacking.unstack(stacked), tree)
    (stack,), rest = stacking.split(stacked)
    assert set(stack) == {"decoder"}
    assert set(stack["decoder"]) == {"layers"}
    assert set(rest["decoder"]) == {"norm"}
    chex.assert_trees_all_equal(stacking.merge([stack], rest), stacked)
    assert stacking.split(tree)[0] == []
    assert stacking.names_of_layers("decoder/layers/mlp", 2) == [
        "decoder/layers_0/mlp",
        "decoder/layers_1/mlp",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loop_over_layers_computes_the_same(name):
    model, batch = family(name), hf_models.random_batch()
    params = random_params(model)
    loop, stacked = scanned(model), stacking.stack(params)
    assert jax.tree.structure(loop.abstract_params()) == jax.tree.structure(stacked)
    chex.assert_trees_all_equal_shapes(loop.abstract_params(), stacked)
    loss, grads = value_and_grad(model, params, batch)
    loop_loss, loop_grads = value_and_grad(loop, stacked, batch)
    np.testing.assert_allclose(loss, loop_loss, rtol=1e-6)
    assert_close(grads, stacking.unstack(loop_grads), 2e-5)


@pytest.mark.parametrize("name", ["t5_1_1", "gemma3"])
def test_initial_values_are_the_same(name):
    model = family(name)
    key = jax.random.key(3)
    stacked = jax.jit(scanned(model).init)(key)
    chex.assert_trees_all_equal(stacking.unstack(stacked), jax.jit(model.init)(key))
    axes = jax.tree.leaves(scanned(model).logical_axes(), is_leaf=is_spec)
    assert [len(one) for one in axes] == [leaf.ndim for leaf in jax.tree.leaves(stacked)]


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_in_a_loop_equals_teacher_forcing(name):
    model, batch = scanned(family(name)), hf_models.random_batch()
    params = random_params(model)
    forced = jax.jit(model.hidden_states)(params, batch)
    length = batch.targets.shape[1]
    prefill = jax.jit(model.prefill, static_argnames="max_length")
    hidden, state = prefill(params, batch.inputs, batch.inputs_mask, max_length=length)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {len(batch.inputs)}
    step, found = jax.jit(model.decode_step), [hidden]
    for index in range(length - 1):
        hidden, state = step(params, state, batch.targets[:, index], index)
        found.append(hidden)
    counts = np.asarray(batch.loss_weights)[..., None]
    np.testing.assert_allclose(jnp.stack(found, 1) * counts, forced * counts, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "policy", "is_loop"),
    [
        ("t5_1_1", "minimal", True),
        ("t5_1_1", "full", False),
        ("gemma2", "minimal", False),
        ("gemma2", "full", True),
    ],
)
def test_rematerialisation_computes_the_same(name, policy, is_loop):
    model, batch = family(name, scan_layers=is_loop), hf_models.random_batch()
    params = random_params(model)
    loss, grads = value_and_grad(model, params, batch)
    again = dataclasses.replace(
        model, config=dataclasses.replace(model.config, remat_policy=policy)
    )
    loss_again, grads_again = value_and_grad(again, params, batch)
    np.testing.assert_allclose(loss, loss_again, rtol=1e-6)
    assert_close(grads, grads_again, 2e-5)


def compiled_gradient(model, rows=8, length=64):
    batch = hf_models.random_batch(rows=rows, inputs=length, targets=length)

    def loss(params):
        return jnp.sum(model.hidden_states(params, batch) ** 2)

    return jax.jit(jax.grad(loss)).lower(model.abstract_params()).compile()


def deep(depth, **changes):
    config = family("llama3").config
    return dataclasses.replace(
        family("llama3"),
        config=dataclasses.replace(config, layer_kinds=("full",) * depth, **changes),
    )


def of_kinds(kinds, **changes):
    """A Gemma 3 with these kinds of layers, 's' for a sliding window, 'f' for full attention."""
    names = {"s": "sliding", "f": "full"}
    model = family("gemma3")
    config = dataclasses.replace(model.config, layer_kinds=[names[kind] for kind in kinds])
    return dataclasses.replace(model, config=dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ("f" * 12, [(0, "f", 12)]),
        ("sf" * 6, [(0, "sf", 6)]),
        ("sssssf" * 4 + "ss", [(0, "sssssf", 4), (24, "s", 2)]),
        ("f" * 28 + "s" * 20, [(0, "f", 28), (28, "s", 20)]),
        ("rrrn" * 9, [(0, "rrrn", 9)]),
        ("sfsfs", [(0, "sf", 2), (4, "s", 1)]),
        ("sssssf" * 2 + "s", [(0, "sssssf", 2), (12, "s", 1)]),
        ("s", [(0, "s", 1)]),
    ],
)
def test_sections_are_periods_and_remainders(kinds, wanted):
    sections = stacking.sections(kinds)
    assert [(one.start, "".join(one.kinds), one.turns) for one in sections] == wanted
    assert sum(one.num_layers for one in sections) == len(kinds)
    assert "".join("".join(one.kinds) * one.turns for one in sections) == kinds


@pytest.mark.parametrize("kinds", ["sssf" * 2 + "s", "ff" + "ss" * 2 + "f"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_remainder_computes_the_same(kinds, policy):
    """Loss and gradients, prefill and decode steps, of layers that fill no last period."""
    model, batch = of_kinds(kinds, remat_policy=policy), hf_models.random_batch()
    loop = scanned(model)
    assert len(stacking.sections(kinds)) > 1
    params = random_params(model)
    stacked = stacking.stack(params)
    chex.assert_trees_all_equal_shapes(loop.abstract_params(), stacked)
    loss, grads = value_and_grad(model, params, batch)
    loop_loss, loop_grads = value_and_grad(loop, stacked, batch)
    np.testing.assert_allclose(loss, loop_loss, rtol=1e-6)
    assert_close(grads, stacking.unstack(loop_grads), 2e-5)

    def read(model, params):
        hidden, state = model.prefill(params, batch.inputs, batch.inputs_mask, max_length=4)
        for index in range(3):
            step, state = model.decode_step(params, state, batch.targets[:, index], index)
            hidden = jnp.concatenate([hidden, step], axis=-1)
        return hidden, state.cache

    hidden, cache = jax.jit(read, static_argnums=0)(model, params)
    loop_hidden, loop_cache = jax.jit(read, static_argnums=0)(loop, stacked)
    np.testing.assert_allclose(hidden, loop_hidden, atol=2e-5)
    for number, layer in enumerate(cache):
        own = jax.tree.map(lambda leaf, n=number: leaf[:, n], loop_cache)
        chex.assert_trees_all_close(layer, own, atol=2e-5)


def loops_of(jaxpr):
    """The bodies of all loops in a program."""
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                if eqn.primitive.name == "scan":
                    yield inner
                yield from loops_of(inner)


def equations(jaxpr, name):
    """The equations of that name in a program, within remat and calls as well."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, name)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_loop_does_not_choose_between_kinds(policy):
    """Five sliding layers and a full one: a body for each, with the mask of its kind alone."""
    model = scanned(of_kinds("sssssf" * 2 + "s"), remat_policy=policy)
    batch = hf_models.random_batch()
    length = batch.inputs.shape[1] + batch.targets.shape[1] - 1

    def step(params):
        _, state = model.prefill(params, batch.inputs, batch.inputs_mask, max_length=9)
        return model.decode_step(params, state, batch.targets[:, 0], 0)

    def forward(params):
        return model.hidden_states(params, batch)

    for program in (forward, step):
        loops = list(loops_of(jax.make_jaxpr(program)(model.abstract_params()).jaxpr))
        softmaxes = [sum(1 for _ in equations(loop, "exp")) for loop in loops]
        # Prefill and step have two loops each.
        assert softmaxes == [6, 1] * (1 if program is forward else 2)
        for loop in loops:
            assert not list(equations(loop, "cond"))
            for eqn in equations(loop, "select_n"):
                # The index of a layer alone is selected: counted from the end if it is negative.
                assert eqn.outvars[0].aval.shape == (), eqn
    bias = (len(batch.inputs), 1, length, length)
    whole, rest = loops_of(jax.make_jaxpr(forward)(model.abstract_params()).jaxpr)
    counts = [sum(one.aval.shape == bias for one in loop.invars) for loop in (whole, rest)]
    assert counts == [2, 1], counts


@pytest.mark.parametrize("policy", ["none", "full"])
def test_layers_of_a_loop_drop_by_keys_of_their_own(policy, monkeypatch):
    """Bodies of one turn, and loops one after the other, would otherwise drop alike."""
    kinds = "sssf" * 2 + "s"
    model = scanned(of_kinds(kinds, dropout_rate=0.1, remat_policy=policy))
    seen = []
    bernoulli = jax.random.bernoulli

    def spy(key, *args):
        jax.debug.callback(
            lambda data: seen.append(tuple(map(int, data))), jax.random.key_data(key)
        )
        return bernoulli(key, *args)

    monkeypatch.setattr(jax.random, "bernoulli", spy)
    batch, params = hf_models.random_batch(), random_params(model)
    jax.block_until_ready(model.hidden_states(params, batch, dropout_key=jax.random.key(3)))
    jax.effects_barrier()
    # Two of each layer, and those of embeddings and of the last norm.
    assert len(seen) == 2 * len(kinds) + 2
    assert len(set(seen)) == len(seen)


def test_policies_save_memory_in_their_order():
    sizes = {
        policy: compiled_gradient(deep(8, scan_layers=True, remat_policy=policy))
        .memory_analysis()
        .temp_size_in_bytes
        for policy in ("none", *POLICIES)
    }
    assert sizes["full"] < 0.7 * sizes["minimal"], sizes
    assert sizes["minimal"] < 0.7 * sizes["none"], sizes


def test_what_is_compiled_does_not_grow_with_the_depth():
    def size(model):
        return len(compiled_gradient(model, rows=2, length=8).as_text().splitlines())

    assert size(deep(12, scan_layers=True)) <= 1.02 * size(deep(4, scan_layers=True))
    assert size(deep(12)) > 2 * size(deep(4))


@pytest.mark.pitfall(33)
@pytest.mark.parametrize("name", ["t5_1_1", "llama3"])
@pytest.mark.parametrize("is_loop", [False, True])
def test_rematerialisation_leaves_the_cache_on(name, is_loop):
    """A decode step costs what it costs without, and reads the cache (trl#1798)."""

    def step_cost(policy):
        model = family(name, scan_layers=is_loop, remat_policy=policy)
        batch = hf_models.random_batch(inputs=48)

        def read(params):
            return model.prefill(params, batch.inputs, batch.inputs_mask, max_length=16)[1]

        params = model.abstract_params()
        state = jax.eval_shape(read, params)
        assert any(leaf.size > batch.inputs.size for leaf in jax.tree.leaves(state))
        tokens = batch.targets[:, 0]
        lowered = jax.jit(model.decode_step).lower(params, state, tokens, 3)
        return lowered.compile().cost_analysis()["flops"]

    assert step_cost("full") == step_cost("minimal") == step_cost("none")


def stacked_adapters(params):
    return {"adapters": stacking.stack(params["adapters"]), "base": stacking.stack(params["base"])}


@pytest.mark.parametrize("name", ["t5_1_1", "gemma2"])
def test_adapters_of_stacked_layers(name):
    model, batch = (
        LoRA(family(name), rank=4, alpha=4.0, base_dtype="float32"),
        hf_models.random_batch(),
    )
    loop = dataclasses.replace(model, model=scanned(model.model))
    key = jax.random.key(1)
    one, other = jax.jit(lambda key: (model.init_adapters(key), loop.init_adapters(key)))(key)
    chex.assert_trees_all_equal(stacking.unstack(other), one)
    params = random_params(model)
    stacked = stacked_adapters(params)
    chex.assert_trees_all_equal_shapes(loop.abstract_params(), stacked)
    ranks = jax.tree.map(len, loop.logical_axes(), is_leaf=is_spec)
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, stacked)
    loss, grads = value_and_grad(model, params, batch)
    loop_loss, loop_grads = value_and_grad(loop, stacked, batch)
    np.testing.assert_allclose(loss, loop_loss, rtol=1e-6)
    assert_close(grads["adapters"], stacking.unstack(loop_grads["adapters"]), 2e-5)
    assert_close(jax.jit(model.merge)(params), stacking.unstack(jax.jit(loop.merge)(stacked)), 1e-6)


@pytest.mark.parametrize("name", ["t5_1_1", "llama3"])
def test_int8_weights_of_stacked_layers(name):
    model, batch = Int8(family(name)), hf_models.random_batch()
    loop = Int8(scanned(model.model))
    params = random_params(model.model)
    one, other = model.quantise(params), loop.quantise(stacking.stack(params))
    chex.assert_trees_all_equal(stacking.unstack(other["weights"]), one["weights"])
    chex.assert_trees_all_equal_shapes(loop.abstract_params(), other)
    hidden = jax.jit(model.hidden_states)(one, batch)
    np.testing.assert_allclose(
        jax.jit(loop.hidden_states)(other, batch), hidden, atol=1e-5 * float(jnp.max(abs(hidden)))
    )


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="remat_policy must be one of none, minimal, full; got"):
        family("llama3", remat_policy="some")
    with pytest.raises(ValueError, match="REMAT_POLICY"):
        family("t5_1_1", remat_policy="some")
