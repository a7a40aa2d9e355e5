"""The rollout as the train loop uses it: jitted, sharded, new noise every step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.common.batch import Batch
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.rollout import Rollout, mix_outputs, rollout_metrics, sample_outputs
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.sampling.methods import Greedy, Sample
from gkd_jax.training import jitted_functions

VOCAB_SIZE = 40
EOS_IDS = (1, 11, 19)
LENGTH = 9


@pytest.fixture(scope="module")
def policy():
    """A T5 of well-conditioned layers whose logits, of deviation 3, make outputs vary."""
    model = T5(
        T5Config(
            vocab_size=VOCAB_SIZE,
            emb_dim=16,
            num_heads=2,
            num_encoder_layers=1,
            num_decoder_layers=1,
            head_dim=8,
            mlp_dim=24,
            dropout_rate=0.5,
            dtype="float32",
        )
    )
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = rng.normal(size=leaf.shape)
        if "kernel" in name:
            values /= np.sqrt(leaf.shape[0])
        elif "scale" in name:
            values = (3 if "decoder_norm" in name else 1) + 0.1 * values
        return jnp.asarray(values, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def make_batch(*, fillers=(), first_id=50):
    """Eight prompts of different length, with outputs that must not matter."""
    rng = np.random.default_rng(1)
    mask = np.arange(7)[None] < 1 + np.arange(8)[:, None] % 7
    example_id = first_id + np.arange(8)
    example_id[list(fillers)] = -1
    return Batch(
        inputs=jnp.asarray(np.where(mask, rng.integers(1, VOCAB_SIZE, (8, 7)), 0), jnp.int32),
        inputs_mask=jnp.asarray(mask),
        targets=jnp.asarray(rng.integers(1, VOCAB_SIZE, (8, LENGTH)), jnp.int32),
        loss_weights=jnp.ones((8, LENGTH)),
        example_id=jnp.asarray(example_id, jnp.int32),
    )


@functools.cache
def make_rollout_fn(model, rollout):
    """One jitted rollout for all tests that want the same."""
    return jax.jit(
        functools.partial(sample_outputs, model, rollout=rollout, eos_ids=EOS_IDS, pad_id=0)
    )


def first_end(row):
    """Length of an output by its tokens, as a person would count it."""
    ends = [place for place, token in enumerate(row) if token in EOS_IDS]
    return ends[0] + 1 if ends else len(row)


@pytest.mark.pitfall(17)
def test_replaces_outputs_and_weights_them_up_to_their_end(policy):
    model, params = policy
    batch = make_batch(fillers=[5])
    out = make_rollout_fn(model, Rollout(num_samples=3))(params, batch, key=jax.random.key(0))
    np.testing.assert_array_equal(out.inputs, np.repeat(batch.inputs, 3, axis=0))
    np.testing.assert_array_equal(out.inputs_mask, np.repeat(batch.inputs_mask, 3, axis=0))
    np.testing.assert_array_equal(out.example_id, np.repeat(batch.example_id, 3))
    assert out.targets.shape == out.loss_weights.shape == out.sample_log_probs.shape == (24, LENGTH)
    assert out.targets.dtype == batch.targets.dtype
    lengths = np.array([first_end(row) for row in out.targets.tolist()])
    lengths[15:18] = 0
    assert {1, LENGTH} < set(lengths)
    np.testing.assert_array_equal(out.loss_weights, np.arange(LENGTH)[None] < lengths[:, None])
    assert (np.asarray(out.targets)[np.asarray(out.loss_weights) == 0] == 0).all()
    outputs = out.targets.reshape(8, 3, LENGTH)
    assert (outputs[:, 0] != outputs[:, 1]).any()


@pytest.mark.pitfall(16)
@pytest.mark.parametrize(
    "method", [Greedy(), pytest.param(Sample(), marks=pytest.mark.slow)], ids=str
)
def test_outputs_do_not_depend_on_how_long_the_other_prompts_are(policy, method):
    """A row with its prompt unpadded and alone gives what it gives among longer ones."""
    model, params = policy
    rollout_fn = make_rollout_fn(model, Rollout(method=method))
    key, batch = jax.random.key(0), make_batch()
    lengths = np.asarray(batch.inputs_mask).sum(axis=1)
    together = rollout_fn(params, batch, key=key)
    for row in (0, 3, 6):
        length = int(lengths[row])
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
        alone = alone.replace(
            inputs=alone.inputs[:, :length], inputs_mask=alone.inputs_mask[:, :length]
        )
        alone = rollout_fn(params, alone, key=key)
        assert alone.inputs_mask.all()
        for name in ("targets", "loss_weights", "example_id"):
            one, other = getattr(alone, name)[0], getattr(together, name)[row]
            np.testing.assert_array_equal(one, other, err_msg=name)
        np.testing.assert_allclose(
            alone.sample_log_probs[0], together.sample_log_probs[row], atol=1e-5
        )
        # All of the output counts, and the prompt has no place in it.
        assert alone.loss_weights[0].sum() == first_end(alone.targets[0].tolist())
        assert alone.targets.shape == (1, LENGTH)
    assert {int(lengths[row]) for row in (0, 3, 6)} == {1, 4, 7}


def test_log_probs_equal_scoring_without_dropout(policy):
    model, params = policy
    out = make_rollout_fn(model, Rollout(num_samples=3))(
        params, make_batch(), key=jax.random.key(0)
    )
    logits = jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))(params, out)
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.take_along_axis(log_probs, np.asarray(out.targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.sample_log_probs, wanted * out.loss_weights, atol=1e-5)


@pytest.mark.pitfall(35)
@pytest.mark.pitfall(50)
def test_every_step_has_new_noise_and_no_new_compilation(policy):
    model, params = policy
    rollout_fn = jax.jit(
        functools.partial(sample_outputs, model, rollout=Rollout(), eos_ids=(), pad_id=0)
    )
    base = jax.random.key(0)
    steps = [
        rollout_fn(params, make_batch(), key=jax.random.fold_in(base, step))
        for step in (0, 1, 2, 0)
    ]
    assert rollout_fn._cache_size() == 1
    first, second, third, again = (np.asarray(step.targets) for step in steps)
    for one, other in ((first, second), (first, third), (second, third)):
        assert (one != other).any(axis=1).all()
    np.testing.assert_array_equal(first, again)


def test_noise_belongs_to_the_example_not_to_the_row(policy):
    model, params = policy
    rollout_fn = make_rollout_fn(model, Rollout(num_samples=3))
    batch = make_batch()
    order = np.array([6, 2, 7, 0, 1, 5, 4, 3])
    moved = jax.tree.map(lambda x: x[order], batch)
    plain = rollout_fn(params, batch, key=jax.random.key(0))
    other = rollout_fn(params, moved, key=jax.random.key(0))
    np.testing.assert_array_equal(
        other.targets.reshape(8, 3, -1), plain.targets.reshape(8, 3, -1)[order]
    )


@pytest.mark.pitfall(41)
def test_sharded_rollout_equals_the_plain_one(policy):
    """Also where the outputs of one device end long before those of another."""
    model, params = policy
    rollout_fn = make_rollout_fn(model, Rollout(num_samples=3))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec, sharding = jax.sharding.PartitionSpec, jax.sharding.NamedSharding

    def shard(axes):
        names = [{"heads": "model", "joined_kv": "model", "vocab": "model"}.get(a) for a in axes]
        return sharding(mesh, spec(*names))

    is_spec = lambda x: isinstance(x, spec)  # noqa: E731
    placed = jax.tree.map(
        lambda axes, x: jax.device_put(x, shard(axes)),
        model.logical_axes(),
        params,
        is_leaf=is_spec,
    )
    batch = make_batch(fillers=[3])
    rows = jax.device_put(batch, sharding(mesh, spec("data")))
    plain = rollout_fn(params, batch, key=jax.random.key(0))
    out = rollout_fn(placed, rows, key=jax.random.key(0))
    np.testing.assert_array_equal(out.targets, plain.targets)
    np.testing.assert_array_equal(out.loss_weights, plain.loss_weights)
    np.testing.assert_allclose(out.sample_log_probs, plain.sample_log_probs, atol=1e-5)
    longest = np.asarray(out.loss_weights).sum(axis=1).reshape(4, -1).max(axis=1)
    assert longest.min() < longest.max()
    assert out.targets.sharding.spec[0] == "data"


def test_parameters_are_gathered_once_not_at_every_token(policy):
    """Where the rules split them over the devices of the batch: before the loop, not within it."""
    model, params = policy
    partitioner = Partitioner(data_parallelism=4, model_parallelism=2, rules="fsdp")
    fn = jitted_functions.jit_rollout(Rollout(), model, partitioner, eos_ids=EOS_IDS, pad_id=0)
    sharded = jax.device_put(params, partitioner.param_shardings(model))
    batch = partitioner.shard_batch(make_batch())
    program = fn.lower(sharded, batch, jax.random.key(0)).compile().as_text()
    computations = re.split(r"\n(?=\S)", program)
    gathering = [text.split()[0] for text in computations if "all-gather(" in text]
    assert gathering == ["ENTRY"]
    plain = make_rollout_fn(model, Rollout())(params, make_batch(), key=jax.random.key(0))
    sampled = fn(sharded, batch, jax.random.key(0))
    np.testing.assert_array_equal(sampled.targets, plain.targets)


def test_no_gradient_flows_through_the_rollout(policy):
    model, params = policy
    batch = make_batch()

    @jax.jit
    def gradient(params):
        def loss(params):
            out = sample_outputs(
                model,
                params,
                batch,
                key=jax.random.key(0),
                rollout=Rollout(),
                eos_ids=EOS_IDS,
                pad_id=0,
            )
            return jnp.sum(out.sample_log_probs) + jnp.sum(out.loss_weights)

        return jax.grad(loss)(params)

    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient(params)))


def test_target_length_and_method_are_used(policy):
    model, params = policy
    rollout = Rollout(method=Greedy(), target_length=4)
    outputs = [
        make_rollout_fn(model, rollout)(params, make_batch(), key=jax.random.key(i)) for i in (0, 1)
    ]
    assert outputs[0].targets.shape == (8, 4)
    np.testing.assert_array_equal(outputs[0].targets, outputs[1].targets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"num_samples": 2, "method": Greedy()}, "always gives the same output"),
        ({"target_length": 0}, "Rollout.target_length must be at least 1; got 0"),
        ({"chunk_size": 0}, "Rollout.chunk_size must be at least 1; got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Rollout(**settings)


def test_temperature_zero_is_refused():
    with pytest.raises(ValueError, match=r"use Greedy\(\)"):
        Rollout(method=Sample(temperature=0))


@pytest.mark.pitfall(48)
def test_each_example_tosses_its_own_coin(policy):
    """A row has its sample, weights too, or the data's output; by example, whatever its row."""
    model, params = policy
    batch = make_batch()
    sampled = make_rollout_fn(model, Rollout())(params, batch, key=jax.random.key(0))
    mix = jax.jit(mix_outputs)
    rows = []
    for step in range(50):
        mixed = mix(batch, sampled, fraction=jnp.float32(0.3), key=jax.random.key(step))
        is_own = np.all(mixed.targets == sampled.targets, axis=1)
        is_data = np.all(mixed.targets == batch.targets, axis=1)
        np.testing.assert_array_equal(is_own, ~is_data)
        expected = np.where(is_own[:, None], sampled.loss_weights, batch.loss_weights)
        np.testing.assert_array_equal(mixed.loss_weights, expected)
        rows.append(is_own)
    assert abs(np.mean(rows) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 400)
    assert np.any(np.any(rows, axis=1) & ~np.all(rows, axis=1))

    order = np.arange(8)[::-1]
    back = [jax.tree.map(lambda x: x[order], one) for one in (batch, sampled)]
    mixed = mix(*back, fraction=jnp.float32(0.3), key=jax.random.key(49))
    np.testing.assert_array_equal(np.all(mixed.targets == back[1].targets, axis=1), is_own[order])
    for fraction, source in ((0.0, batch), (1.0, sampled)):
        mixed = mix(batch, sampled, fraction=jnp.float32(fraction), key=jax.random.key(0))
        np.testing.assert_array_equal(mixed.targets, source.targets)


def metrics_of(rows, *, eos_ids=(1,), length=12, fillers=()):
    targets = np.zeros((len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for number, row in enumerate(rows):
        targets[number, : len(row)] = row
        weights[number, : len(row)] = 1
    example_id = np.arange(len(rows))
    example_id[list(fillers)] = -1
    weights[list(fillers)] = 0
    batch = Batch(
        inputs=jnp.zeros((len(rows), 1), jnp.int32),
        inputs_mask=jnp.ones((len(rows), 1), bool),
        targets=jnp.asarray(targets),
        loss_weights=jnp.asarray(weights),
        example_id=jnp.asarray(example_id),
    )
    metrics = jax.jit(functools.partial(rollout_metrics, eos_ids=eos_ids))(batch)
    return {name: (float(total), float(weight)) for name, (total, weight) in metrics.items()}


def test_metrics_by_hand():
    rows = [
        [2, 3, 4, 5, 6, 1],  # 3 4-grams, all new
        [2, 3, 2, 3, 2, 3, 1],  # 2323 3232 2323 3231: 1 of 4 repeats
        [9] * 12,  # 9 4-grams, 8 repeats, truncated
        [5, 1],  # no 4-gram
        [7] * 12,  # filler
    ]
    metrics = metrics_of(rows, fillers=[4])
    assert metrics["output_length"] == (6 + 7 + 12 + 2, 4)
    assert metrics["truncated_share"] == (1, 4)
    total, weight = metrics["repetition"]
    assert weight == 3
    np.testing.assert_allclose(total, 0 + 1 / 4 + 8 / 9, rtol=1e-6)


def test_padding_is_no_repetition():
    # After the end all tokens are equal: they must not count, nor grams that reach into them.
    assert metrics_of([[2, 3, 4, 5, 1]], length=40)["repetition"] == (0, 1)


def test_metrics_when_padding_is_the_end_or_nothing_ends():
    assert metrics_of([[2, 0], [2] * 12], eos_ids=(0,))["truncated_share"] == (1, 2)
    assert metrics_of([[2] * 12, [3] * 12], eos_ids=())["truncated_share"] == (2, 2)
    assert metrics_of([[2, 3, 1]], length=3)["repetition"] == (0, 0)


@pytest.mark.pitfall(47)
def test_collapse_to_one_token_shows_as_repetition():
    total, weight = metrics_of([[8] * 200, [3] * 199 + [1]], length=200)["repetition"]
    assert total / weight > 0.98
    rng = np.random.default_rng(0)
    total, weight = metrics_of(rng.integers(2, 1000, (4, 200)).tolist(), length=200)["repetition"]
    assert total / weight < 0.01
