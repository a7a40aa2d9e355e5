"""The loss in chunks: what it never makes, what it skips, and that a mesh changes nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_references import ALL_IN_ONE, EVERY, unembed
from float32_rounding import assert_within_rounding
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gkd_jax.common.mesh_axes import MeshAxes, use_mesh_axes
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.objectives import (
    ForwardKL,
    GeneralizedJSD,
    Objective,
    PolicyGradient,
    Predictions,
    ReverseKL,
    WeightedSum,
    final_weights,
    fused,
    fused_weighted_loss,
    weighted_loss,
)

pytestmark = pytest.mark.usefixtures("fully_compiled")

REWARDED = WeightedSum((ReverseKL(), PolicyGradient()), (0.25, 0.75))
B, T, D, V = 8, 6, 8, 64


def make_arrays(seed=0):
    rng = np.random.default_rng(seed)
    weights = (np.arange(T) < rng.integers(0, T + 1, B)[:, None]).astype(np.float32)
    return {
        "hidden": rng.normal(size=(B, T, D)).astype(np.float32),
        "head": rng.normal(size=(D, V)).astype(np.float32),
        "teacher_hidden": rng.normal(size=(B, T, D + 2)).astype(np.float32),
        "teacher_head": rng.normal(size=(D + 2, V)).astype(np.float32),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "advantages": rng.normal(size=(B, T)).astype(np.float32),
        "weights": np.asarray(final_weights(jnp.asarray(weights), reduction="per_sequence")),
    }


def make_loss(form, objective, unembed=unembed):
    """A jit-able function of `make_arrays` to (loss, per token) and the student's gradients."""

    def loss_fn(trained, arrays):
        teacher = Predictions(arrays["teacher_hidden"], arrays["teacher_head"], unembed)
        return form(
            objective,
            student=Predictions(*trained, unembed),
            teacher=teacher if objective.divergence.needs_teacher else None,
            targets=arrays["targets"],
            weights=arrays["weights"],
            advantages=arrays["advantages"] if objective.divergence.needs_advantages else None,
        )

    def loss_and_gradients(arrays):
        trained = (arrays["hidden"], arrays["head"])
        return jax.value_and_grad(loss_fn, has_aux=True)(trained, arrays)

    return loss_and_gradients


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "MIN_CHUNK", 4)
    monkeypatch.setattr(fused, "CHUNK_ENTRIES", 4 * V)
    monkeypatch.setattr(fused, "GROUP_ENTRIES", 2 * V)


def assert_close(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        atol = 1e-6 * max(np.abs(right).max(), 1e-6)
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=atol)


MESHES = [(8, 1), (4, 2), (1, 8)]


@pytest.mark.parametrize("shape", MESHES)
def test_a_mesh_changes_nothing(shape, small_chunks):
    """A sum of every divergence, each with a weight that shows."""
    check_on_mesh(ALL_IN_ONE, shape)


def test_a_mesh_changes_nothing_of_rewards(small_chunks):
    check_on_mesh(REWARDED, (4, 2))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_a_mesh_changes_nothing_of_each_divergence(divergence, shape, small_chunks):
    check_on_mesh(divergence, shape)


def check_on_mesh(divergence, shape):
    """Rows over 'data', the vocabulary over 'model'; and no device ever has all of it.

    Two orders of the same sums: each is within `loss_bounds` of the exact value, by float32's
    rounding of the numbers that are added, whatever the machine. A part that is left out, or added
    twice, is off by far more.
    """
    arrays = make_arrays()
    objective = Objective(divergence, z_loss=1e-3)
    expected = jax.jit(make_loss(weighted_loss, objective))(arrays)

    partitioner = Partitioner(data_parallelism=shape[0], model_parallelism=shape[1])
    specs = dict.fromkeys(arrays, P("data")) | dict.fromkeys(
        ("head", "teacher_head"), P(None, "model")
    )
    shardings = {name: partitioner.sharding(*spec) for name, spec in specs.items()}
    sharded = jax.device_put(arrays, shardings)
    rows = shardings["hidden"]
    outputs = ((partitioner.replicated, rows), (rows, shardings["head"]))
    step = jax.jit(
        partitioner.annotate(make_loss(fused_weighted_loss, objective)), out_shardings=outputs
    )
    found = jax.device_get((step(sharded), expected))
    assert_within_rounding(*found, objective, arrays)
    program = step.lower(sharded).compile().as_text()
    gathered = re.findall(r"= (.*) all-gather", program)
    assert not [text for text in gathered if re.search(rf"[\[,]{V}[\],]", text)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shards_of_different_work(dtype, small_chunks):
    """One shard has every position, others few or none; the head may be of bfloat16."""
    arrays = make_arrays()
    counts = np.zeros((B, T), np.float32)
    counts[:2] = counts[6, :3] = 1.0
    arrays["weights"] = counts / counts.sum()
    arrays = {
        k: v if k in ("targets", "weights", "advantages") else jnp.asarray(v, dtype)
        for k, v in arrays.items()
    }
    objective = Objective(GeneralizedJSD(0.5))
    expected = jax.jit(make_loss(weighted_loss, objective))(arrays)

    partitioner = Partitioner(data_parallelism=4, model_parallelism=2)
    specs = dict.fromkeys(arrays, P("data")) | dict.fromkeys(
        ("head", "teacher_head"), P(None, "model")
    )
    shardings = {name: partitioner.sharding(*spec) for name, spec in specs.items()}
    step = jax.jit(partitioner.annotate(make_loss(fused_weighted_loss, objective)))
    (loss, per_token), gradients = jax.device_get(step(jax.device_put(arrays, shardings)))
    rtol = 1e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(loss, expected[0][0], rtol=1e-5)
    np.testing.assert_allclose(per_token, expected[0][1], rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, expected[1], strict=True):
        assert one.dtype == dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


@pytest.fixture
def three_axes():
    """A mesh with an axis for each of rows, positions of a sequence and the vocabulary."""
    return jax.make_mesh((2, 2, 2), ("data", "sequence", "model"), (AxisType.Auto,) * 3)


def with_roles(mesh, roles, function):
    def called(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), use_mesh_axes(roles):
            return function(*arguments)

    return called


def test_positions_may_be_split_too(three_axes, small_chunks):
    """Each shard of rows and positions has chunks of its own."""
    arrays, objective = make_arrays(4), Objective(GeneralizedJSD(0.3))
    expected = jax.jit(make_loss(weighted_loss, objective))(arrays)
    roles = MeshAxes(rows=("data",), sequence=("sequence",), width=("model",))
    loss = with_roles(three_axes, roles, make_loss(fused_weighted_loss, objective))
    specs = dict.fromkeys(arrays, P("data", "sequence")) | dict.fromkeys(
        ("head", "teacher_head"), P(None, "model")
    )
    shardings = {name: NamedSharding(three_axes, spec) for name, spec in specs.items()}
    found = jax.jit(loss)(jax.device_put(arrays, shardings))
    assert_within_rounding(*jax.device_get((found, expected)), objective, arrays)
    odd = {k: v if k.endswith("head") else v[:, :5] for k, v in arrays.items()}
    with pytest.raises(ValueError, match=r"got 5 positions and 2\. Set DatasetConfig\.feature_"):
        jax.jit(loss)(odd)


def test_the_vocabulary_is_split_over_the_axes_that_are_told(three_axes, monkeypatch):
    """And over no other: an axis without a role splits nothing."""
    seen = []

    def chunk_positions(vocab_size, num_positions, *, platform):
        seen.append((vocab_size, num_positions))
        return num_positions

    monkeypatch.setattr(fused, "chunk_positions", chunk_positions)
    loss = make_loss(fused_weighted_loss, Objective(ForwardKL()))
    for roles, expected in (
        (MeshAxes(), (V, B * T)),
        (MeshAxes(rows=("data",)), (V, B * T // 2)),
        (MeshAxes(rows=("data",), width=("model",)), (V // 2, B * T // 2)),
    ):
        jax.eval_shape(with_roles(three_axes, roles, loss), make_arrays())
        assert seen[-1] == expected


def test_rows_that_do_not_divide_over_the_mesh_are_refused():
    arrays = {k: v if k.endswith("head") else v[:6] for k, v in make_arrays().items()}
    partitioner = Partitioner(data_parallelism=4, model_parallelism=2)
    step = jax.jit(partitioner.annotate(make_loss(fused_weighted_loss, Objective(ForwardKL()))))
    with pytest.raises(ValueError, match=r"got 6 rows and 4\. Set DatasetConfig\.batch_size"):
        step(arrays)


def test_the_cotangent_of_the_loss_scales_its_gradients(small_chunks):
    """And 0 makes them 0, even where the loss is infinite."""
    arrays = make_arrays()
    arrays["teacher_hidden"][..., 0] = 1.0
    objective = Objective(ReverseKL())

    @jax.jit
    def gradients(arrays, factor):
        def loss(trained):
            return (
                factor
                * fused_weighted_loss(
                    objective,
                    student=Predictions(*trained, unembed),
                    teacher=Predictions(arrays["teacher_hidden"], arrays["teacher_head"], unembed),
                    targets=arrays["targets"],
                    weights=arrays["weights"],
                )[0]
            )

        return jax.grad(loss)((arrays["hidden"], arrays["head"]))

    assert_close(gradients(arrays, -3.0), jax.tree.map(lambda g: -3.0 * g, gradients(arrays, 1.0)))
    arrays["teacher_head"][0, 5] = -np.inf
    for leaf in gradients(arrays, 0.0):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.pitfall(31)
@pytest.mark.parametrize("objective", [Objective(ForwardKL()), Objective(GeneralizedJSD(0.5))])
def test_no_array_of_all_positions_and_the_vocabulary(objective):
    """From the compiler's own account, at 4,096 positions and T5's vocabulary."""
    vocab = 32_128
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32 if name == "targets" else jnp.float32)
        for name, shape in {
            "hidden": (32, 128, 128), "head": (128, vocab), "teacher_hidden": (32, 128, 256),
            "teacher_head": (256, vocab), "targets": (32, 128), "weights": (32, 128),
        }.items()
    }  # fmt: skip

    def temporary(form):
        compiled = jax.jit(make_loss(form, objective)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(fused_weighted_loss) < temporary(weighted_loss) / 20


@pytest.mark.pitfall(32)
def test_nothing_of_the_teacher_and_no_logits_are_kept_for_the_backward_pass():
    """The gradients alone are: of the shapes of hidden states and head."""

    def kept(arrays):
        def loss(trained):
            return fused_weighted_loss(
                Objective(ForwardKL()),
                student=Predictions(*trained, unembed),
                teacher=Predictions(arrays["teacher_hidden"], arrays["teacher_head"], unembed),
                targets=arrays["targets"],
                weights=arrays["weights"],
            )[0]

        return jax.vjp(loss, (arrays["hidden"], arrays["head"]))[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, make_arrays()))]
    assert sorted(shapes) == sorted([(B, T, D), (D, V)])


def test_positions_without_weight_cost_nothing(small_chunks):
    """The output layers are run for as many chunks as the positions with weight need."""
    calls = []

    def counted(kernel, hidden):
        jax.debug.callback(lambda: calls.append(hidden.shape))
        return unembed(kernel, hidden)

    arrays = make_arrays()
    step = jax.jit(make_loss(fused_weighted_loss, Objective(ForwardKL()), counted))
    needed = -(-np.count_nonzero(arrays["weights"]) // 4)
    assert 0 < needed < B * T // 4
    jax.block_until_ready(step(arrays))
    jax.effects_barrier()
    assert sorted(calls) == sorted([(4, D), (4, D + 2)] * needed)
    calls.clear()
    (loss, per_token), gradients = step(arrays | {"weights": np.zeros_like(arrays["weights"])})
    jax.effects_barrier()
    assert calls == []
    assert loss == 0
    assert not np.any(per_token)
    assert not any(np.any(leaf) for leaf in gradients)


def test_chunks_shrink_with_the_vocabulary():
    def sizes(platform):
        return [
            fused.chunk_positions(vocab, 1 << 20, platform=platform)
            for vocab in (100, 32_128, 262_144)
        ]

    assert sizes("cpu") == [1024, 128, 16]
    assert sizes("tpu") == [1024, 1024, 128]
    assert fused.chunk_positions(32_128, 100, platform="cpu") == 100
    assert fused.chunk_positions(1 << 24, 100, platform="cpu") == 8


def test_groups_stay_in_a_cache_on_a_cpu_alone():
    vocabs = (100, 32_128, 262_144)
    on_cpu = [fused.group_positions(vocab, 16, platform="cpu") for vocab in vocabs]
    assert on_cpu == [16, 8, 2]
    assert fused.group_positions(32_128, 1, platform="cpu") == 1
    assert fused.group_positions(32_128, 128, platform="tpu") == 128


def test_groups_that_do_not_divide_a_chunk(small_chunks, monkeypatch):
    monkeypatch.setattr(fused, "GROUP_ENTRIES", 3 * V)
    arrays, objective = make_arrays(3), Objective(GeneralizedJSD(0.1), z_loss=1e-3)
    plain, chunks = (
        jax.jit(make_loss(form, objective))(arrays) for form in (weighted_loss, fused_weighted_loss)
    )
    assert_within_rounding(*jax.device_get((chunks, plain)), objective, arrays)


def test_evaluation_without_gradients_is_the_same():
    arrays = make_arrays(1)
    objective = Objective(ReverseKL(), student_temperature=2.0, teacher_temperature=0.5)
    (expected, _), _ = jax.jit(make_loss(fused_weighted_loss, objective))(arrays)

    @jax.jit
    def loss(arrays):
        return fused_weighted_loss(
            objective,
            student=Predictions(arrays["hidden"], arrays["head"], unembed),
            teacher=Predictions(arrays["teacher_hidden"], arrays["teacher_head"], unembed),
            targets=arrays["targets"],
            weights=arrays["weights"],
        )[0]

    np.testing.assert_array_equal(loss(arrays), expected)
