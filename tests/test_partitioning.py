"""Layouts and equal values on eight simulated devices."""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from gkd_jax.common.batch import Batch
from gkd_jax.devices.partitioning import DataLayout, Partitioner
from gkd_jax.devices.processes import fetch_to_host
from gkd_jax.devices.rules import FSDP_RULES, STANDARD_RULES
from gkd_jax.distillation import optimizers

MESHES = [(8, 1), (4, 2), (2, 4)]


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """The three methods of a language model that partitioning asks for, and a loss."""

    vocab: int = 256
    emb: int = 128
    mlp: int = 192
    heads: int = 4

    def axes(self):
        return {
            "token_embedder": {"embedding": (("vocab", "embed"), (self.vocab, self.emb))},
            "layers_0": {
                "mlp": {
                    "wi": {"kernel": (("embed", "mlp"), (self.emb, self.mlp))},
                    "wo": {"kernel": (("mlp", "embed"), (self.mlp, self.emb))},
                },
                "norm": {"scale": (("embed",), (self.emb,))},
                "square": {"kernel": (("embed", "joined_kv"), (self.emb, self.emb))},
            },
            "relpos_bias": {"rel_embedding": (("heads", "relpos_buckets"), (self.heads, 32))},
        }

    def _map(self, fn):
        return jax.tree.map(fn, self.axes(), is_leaf=lambda x: isinstance(x, tuple))

    def logical_axes(self):
        return self._map(lambda entry: PartitionSpec(*entry[0]))

    def abstract_params(self):
        return self._map(lambda entry: jax.ShapeDtypeStruct(entry[1], jnp.float32))

    def init(self, key):
        leaves, tree = jax.tree.flatten(self.abstract_params())
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        )

    def loss(self, params, tokens):
        x = params["token_embedder"]["embedding"][tokens]
        layer = params["layers_0"]
        x = x * layer["norm"]["scale"][None, None, :]
        x = x + jnp.tanh(x @ layer["mlp"]["wi"]["kernel"]) @ layer["mlp"]["wo"]["kernel"] / 100
        x = x @ layer["square"]["kernel"] + jnp.sum(params["relpos_bias"]["rel_embedding"])
        return jnp.mean(jnp.square(x)) / 100


@flax.struct.dataclass
class State:
    params: object
    opt_state: object
    step: object


def make_state(params, tx):
    return State(params=params, opt_state=tx.init(params), step=jnp.int32(0))


ADAFACTOR = optimizers.Adafactor(optimizers.Constant(0.1))


def abstract_and_shardings(partitioner, tx):
    model = TinyModel()
    params = partitioner.param_shardings(model)
    abstract = jax.eval_shape(lambda p: make_state(p, tx), model.abstract_params())
    return abstract, partitioner.state_shardings(abstract, params)


def test_devices_are_eight():
    assert jax.device_count() == 8


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_mesh_has_the_asked_sizes(data, model):
    mesh = Partitioner(model_parallelism=model).mesh
    assert dict(mesh.shape) == {"data": data, "model": model}
    assert mesh.axis_names == ("data", "model")
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2


def test_one_device_is_a_mesh_too():
    partitioner = Partitioner(devices=(jax.devices()[3],))
    assert dict(partitioner.mesh.shape) == {"data": 1, "model": 1}
    params = jax.jit(TinyModel().init, out_shardings=partitioner.param_shardings(TinyModel()))(
        jax.random.key(0)
    )
    assert params["layers_0"]["norm"]["scale"].devices() == {jax.devices()[3]}


def test_data_parallelism_may_leave_devices_out():
    partitioner = Partitioner(data_parallelism=2, model_parallelism=2)
    assert partitioner.mesh.devices.size == 4


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_parameters_lie_as_the_rules_say(data, model):
    shardings = Partitioner(model_parallelism=model).param_shardings(TinyModel())
    layer = shardings["layers_0"]
    assert shardings["token_embedder"]["embedding"].shard_shape((256, 128)) == (256 // model, 128)
    assert layer["mlp"]["wi"]["kernel"].shard_shape((128, 192)) == (128, 192 // model)
    assert layer["mlp"]["wo"]["kernel"].shard_shape((192, 128)) == (192 // model, 128)
    assert layer["norm"]["scale"].spec == PartitionSpec(None)
    assert layer["square"]["kernel"].spec == PartitionSpec(None, "model")
    assert shardings["relpos_bias"]["rel_embedding"].spec == PartitionSpec("model", None)


def test_fsdp_splits_parameters_over_data_too():
    shardings = Partitioner(model_parallelism=2, rules="fsdp").param_shardings(TinyModel())
    layer = shardings["layers_0"]
    assert shardings["token_embedder"]["embedding"].shard_shape((256, 128)) == (128, 32)
    assert layer["mlp"]["wi"]["kernel"].shard_shape((128, 192)) == (32, 96)
    assert layer["norm"]["scale"].shard_shape((128,)) == (32,)


@pytest.fixture(scope="module")
def initial_values():
    return jax.jit(TinyModel().init)(jax.random.key(7))


@pytest.mark.parametrize(
    ("model", "rules"), [(1, "standard"), (2, "standard"), (4, "standard"), (2, "fsdp")]
)
def test_initial_values_are_equal_on_every_mesh(initial_values, model, rules):
    tiny = TinyModel()
    partitioner = Partitioner(model_parallelism=model, rules=rules)
    shardings = partitioner.param_shardings(tiny)
    params = jax.jit(tiny.init, out_shardings=shardings)(jax.random.key(7))
    for got, sharding, expected in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(shardings),
        jax.tree.leaves(initial_values),
        strict=True,
    ):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_adafactor_rows_and_columns_lie_as_the_axes_they_keep():
    partitioner = Partitioner(model_parallelism=4)
    abstract, shardings = abstract_and_shardings(partitioner, ADAFACTOR.build())

    def find(*names):
        out = []
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract.opt_state),
            jax.tree.leaves(shardings.opt_state),
            strict=True,
        ):
            text = jax.tree_util.keystr(path)
            if all(name in text for name in names):
                out.append((leaf.shape, sharding.spec))
        return out

    # wi is [embed 128, mlp 192 on 'model']: rows lose the larger axis, columns the smaller.
    assert find(".v_row", "['wi']") == [((128,), PartitionSpec(None))]
    assert find(".v_col", "['wi']") == [((192,), PartitionSpec("model"))]
    # The embedding is [vocab 256 on 'model', embed 128].
    assert find(".v_row", "['embedding']") == [((128,), PartitionSpec(None))]
    assert find(".v_col", "['embedding']") == [((256,), PartitionSpec("model"))]
    # Square, [embed, joined_kv on 'model']: only the names tell rows from columns.
    assert find(".v_row", "['square']") == [((128,), PartitionSpec(None))]
    assert find(".v_col", "['square']") == [((128,), PartitionSpec("model"))]
    # Not factored: the second moment lies as the parameter; placeholders are replicated.
    assert find(".v[", "['rel_embedding']") == [((4, 32), PartitionSpec("model", None))]
    assert find(".v_row", "['rel_embedding']") == [((1,), PartitionSpec())]
    assert set(find(".count")) == {((), PartitionSpec())}
    assert shardings.step.spec == PartitionSpec()


def test_columns_of_a_square_parameter_keep_its_last_axis():
    """The layout above rests on optax's choice of axes among equals."""
    grad = np.random.default_rng(0).normal(size=(128, 128)).astype(np.float32)
    tx = optax.scale_by_factored_rms()
    _, state = tx.update(grad, tx.init(jnp.asarray(grad)), grad)
    np.testing.assert_allclose(state.v_col, np.square(grad).mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.v_row, np.square(grad).mean(1), rtol=1e-5)


def test_adam_moments_lie_as_the_parameters():
    partitioner = Partitioner(model_parallelism=2, rules="fsdp")
    tx = optimizers.AdamW(optimizers.Constant(0.1), weight_decay=0.1, max_grad_norm=1.0).build()
    _, shardings = abstract_and_shardings(partitioner, tx)
    params = jax.tree.leaves(shardings.params)
    adam = next(
        s for s in jax.tree.leaves(shardings.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
        if hasattr(s, "mu")
    )  # fmt: skip
    assert jax.tree.leaves(adam.mu) == params
    assert jax.tree.leaves(adam.nu) == params


def train_three_steps(partitioner):
    """Initial and final parameters, on the host."""
    tiny = TinyModel()
    tx = optimizers.Adafactor(optimizers.Constant(0.01), max_grad_norm=1.0).build()
    tokens = np.random.default_rng(0).integers(0, tiny.vocab, (3, 16, 5)).astype(np.int32)
    _, shardings = abstract_and_shardings(partitioner, tx)

    def step(state, tokens):
        grads = jax.grad(tiny.loss)(state.params, tokens)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params=params, opt_state=opt_state, step=state.step + 1)

    state = jax.jit(lambda key: make_state(tiny.init(key), tx), out_shardings=shardings)(
        jax.random.key(0)
    )
    start = jax.device_get(state.params)
    jitted = jax.jit(step, out_shardings=shardings, donate_argnums=0)
    for batch in tokens:
        state = jitted(state, jax.device_put(batch, partitioner.batch_sharding))
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return start, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device():
    return train_three_steps(Partitioner(devices=(jax.devices()[0],)))


@pytest.mark.parametrize(
    ("model", "rules", "num_slices"),
    [
        (2, "standard", None),
        (2, "fsdp", None),
        (2, "fsdp", 2),
        pytest.param(1, "standard", None, marks=pytest.mark.slow),
        pytest.param(1, "fsdp", None, marks=pytest.mark.slow),
        pytest.param(4, "standard", None, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", None, marks=pytest.mark.slow),
    ],
)
def test_three_steps_on_a_mesh_give_the_parameters_of_one_device(
    one_device, model, rules, num_slices
):
    start, want = one_device
    _, got = train_three_steps(
        Partitioner(model_parallelism=model, rules=rules, num_slices=num_slices)
    )
    for initial, a, b in zip(*map(jax.tree.leaves, (start, got, want)), strict=True):
        moved = np.abs(b - initial).max()
        assert moved > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * moved)


def make_batch(rows, with_log_probs=False):
    rng = np.random.default_rng(rows)
    return Batch(
        inputs=rng.integers(0, 9, (rows, 6)),
        inputs_mask=np.ones((rows, 6), bool),
        targets=rng.integers(0, 9, (rows, 4)),
        loss_weights=np.ones((rows, 4), np.float32),
        example_id=np.arange(rows),
        sample_log_probs=np.zeros((rows, 4), np.float32) if with_log_probs else None,
    )


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_shard_batch_splits_rows_in_order(data, model):
    partitioner = Partitioner(model_parallelism=model)
    batch = make_batch(16, with_log_probs=data == 8)
    sharded = partitioner.shard_batch(batch)
    assert sharded.inputs.sharding.shard_shape((16, 6)) == (16 // data, 6)
    assert (sharded.sample_log_probs is None) == (data != 8)
    for got, want in zip(jax.tree.leaves(sharded), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)
    first = partitioner.mesh.devices[0, 0]
    shard = next(s for s in sharded.example_id.addressable_shards if s.device == first)
    np.testing.assert_array_equal(np.asarray(shard.data), np.arange(16 // data))


def test_fetch_to_host_gives_whole_numpy_arrays():
    partitioner = Partitioner(model_parallelism=2)
    batch = make_batch(8)
    got = fetch_to_host(partitioner.shard_batch(batch))
    assert isinstance(got.inputs, np.ndarray)
    np.testing.assert_array_equal(got.inputs, batch.inputs)


def test_single_process_loads_everything():
    assert Partitioner(model_parallelism=2).data_layout == DataLayout(shard_id=0, num_shards=1)


@dataclasses.dataclass
class FakeDevice:
    process_index: int


@pytest.mark.parametrize(
    ("processes", "layouts"),
    [
        # Two processes of four devices, model 2: each loads its half.
        ([[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2), (1, 2)]),
        # Rows in the order of the machine's topology, not of the processes.
        ([[1, 1], [0, 0], [1, 1], [0, 0]], [(1, 2), (0, 2)]),
        # A model spans two processes: both load the same rows.
        ([[0, 0, 1, 1], [2, 2, 3, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_load_the_rows_that_their_devices_hold(monkeypatch, processes, layouts):
    devices = np.vectorize(FakeDevice, otypes=[object])(np.asarray(processes))
    for index, (shard_id, num_shards) in enumerate(layouts):
        partitioner = Partitioner()
        partitioner.__dict__["mesh"] = type("Mesh", (), {"devices": devices})
        monkeypatch.setattr(jax, "process_count", lambda: len(layouts))
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert partitioner.data_layout == DataLayout(shard_id, num_shards)


def test_annotate_lays_named_activations_out():
    partitioner = Partitioner(model_parallelism=4)

    def fn(x):
        return nn.with_logical_constraint(x * 2, ("batch", "length", "mlp"))

    x = jax.device_put(np.ones((4, 3, 8), np.float32), partitioner.replicated)
    out = jax.jit(partitioner.annotate(fn))(x)
    assert out.sharding.shard_shape(out.shape) == (2, 3, 2)
    np.testing.assert_array_equal(out, 2.0)
    assert jax.jit(fn)(x).sharding.shard_shape(out.shape) == (4, 3, 8)


@pytest.mark.parametrize(("batch_size", "num_microbatches"), [(8, 1), (32, 4), (16, 2)])
def test_good_batch_sizes_pass(batch_size, num_microbatches):
    Partitioner().check_batch_size(batch_size, num_microbatches)


def test_bad_batch_sizes_name_the_multiple():
    with pytest.raises(
        ValueError,
        match=r"batch_size must be divisible by the data axis; got 30 and 8\. "
        r"Set DatasetConfig\.batch_size to a multiple of 8\.",
    ):
        Partitioner().check_batch_size(30)
    with pytest.raises(ValueError, match=r"got 16 and 4 \* 8\. .* multiple of 32\."):
        Partitioner(model_parallelism=2).check_batch_size(16, num_microbatches=8)


def test_indivisible_axis_names_parameter_and_remedy():
    with pytest.raises(
        ValueError,
        match=r"model_parallelism must divide the axis 'heads' .* got 4, and 6 in "
        r"relpos_bias/rel_embedding \(6, 32\)\. Set it to a divisor such as 2",
    ):
        Partitioner(model_parallelism=4).param_shardings(TinyModel(heads=6))


def test_unknown_logical_axis_is_named():
    rules = tuple(rule for rule in STANDARD_RULES if rule[0] != "mlp")
    with pytest.raises(ValueError, match=r"'mlp' of parameter layers_0/mlp/wi/kernel"):
        Partitioner(rules=rules).param_shardings(TinyModel())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Partitioner(model_parallelism=0), r"model_parallelism .* got 0"),
        (lambda: Partitioner(rules="2d"), r"Partitioner\.rules .* got '2d'"),
        (lambda: Partitioner(rules=(("embed", "pipe"),)), r"got 'pipe'"),
        (lambda: Partitioner(model_parallelism=3).mesh, r"got 3 and 8\. .* \[1, 2, 4, 8\]"),
        (lambda: Partitioner(data_parallelism=16).mesh, r"got 16 \* 1 and 8"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("embed", "data", 1),), r"Partitioner\.teacher_rules must hold pairs .* 'data', 1"),
        (("embed",), r"must hold pairs of a logical axis and a mesh axis; got 'embed'"),
        (3, r"Partitioner\.teacher_rules .* or a table; got 3"),
    ],
)
def test_wrong_tables_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        Partitioner(teacher_rules=rules)


def test_a_teacher_lies_as_its_own_rules_say_on_the_same_mesh():
    partitioner = Partitioner(model_parallelism=2, teacher_rules="fsdp")
    of_teacher = partitioner.for_teacher()
    assert of_teacher.mesh == partitioner.mesh
    wi = of_teacher.param_shardings(TinyModel())["layers_0"]["mlp"]["wi"]["kernel"]
    assert wi.shard_shape((128, 192)) == (32, 96)
    assert Partitioner(rules="fsdp").for_teacher().rules == "fsdp"


def test_slices_split_batches_and_not_parameters():
    partitioner = Partitioner(model_parallelism=2, rules="fsdp", num_slices=2)
    assert dict(partitioner.mesh.shape) == {"slice": 2, "data": 2, "model": 2}
    assert partitioner.smallest_batch == 4
    sharded = partitioner.shard_batch(make_batch(8))
    assert sharded.inputs.sharding.shard_shape((8, 6)) == (2, 6)
    wi = partitioner.param_shardings(TinyModel())["layers_0"]["mlp"]["wi"]["kernel"]
    assert wi.shard_shape((128, 192)) == (64, 96)
    with pytest.raises(ValueError, match=r"data axis of all slices; got 6 and 4\."):
        partitioner.check_batch_size(6)


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """What laying out a mesh looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "simulated"
    platform: str = "simulated"


def test_slices_are_those_of_the_devices():
    # In an order that is not that of the slices.
    devices = tuple(SliceDevice(id, slice_index=id % 2) for id in range(8))
    found = Partitioner(model_parallelism=2, devices=devices).mesh
    assert found.axis_names == ("slice", "data", "model")
    assert [{d.slice_index for d in part.flat} for part in found.devices] == [{0}, {1}]
    one = Partitioner(num_slices=1, devices=devices).mesh
    assert dict(one.shape) == {"data": 8, "model": 1}
    assert [d.slice_index for d in one.devices.flat] == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match=r"num_slices must be 1 or the number .* got 4 and 2"):
        _ = Partitioner(num_slices=4, devices=devices).mesh
    with pytest.raises(ValueError, match=r"multiple of the number of slices.* got 1 and 2"):
        _ = Partitioner(model_parallelism=8, devices=devices).mesh


def test_fsdp_differs_from_standard_in_embed_only():
    assert set(FSDP_RULES) ^ set(STANDARD_RULES) == {("embed", "data"), ("embed", None)}
