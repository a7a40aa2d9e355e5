"""The training step: one gradient whatever the microbatches, the mesh and the teacher's mode."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gkd_jax.common.batch import Batch
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation import train_step
from gkd_jax.distillation.optimizers import Adafactor, AdamW, Constant
from gkd_jax.models import stacking
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives.divergences import ForwardKL, GeneralizedJSD, NegativeLogLikelihood
from gkd_jax.objectives.objective import Objective

LEARNING_RATE = 1e-2
OBJECTIVE = Objective(GeneralizedJSD(beta=0.5))


def make_model(**sizes) -> T5:
    config = dict(
        vocab_size=64, emb_dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=2,
        head_dim=8, mlp_dim=32, dtype="float32",
    )  # fmt: skip
    return T5(T5Config(**(config | sizes)))


def make_batch(batch_size: int = 8, length: int = 6, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, batch_size)
    lengths[0] = length
    weights = (np.arange(length) < lengths[:, None]).astype(np.float32)
    return Batch(
        inputs=rng.integers(2, 64, (batch_size, 5)).astype(np.int32),
        inputs_mask=np.arange(5) < rng.integers(1, 6, batch_size)[:, None],
        targets=(rng.integers(2, 64, (batch_size, length)) * weights).astype(np.int32),
        loss_weights=weights,
        example_id=np.arange(batch_size, dtype=np.int32),
    )


STUDENT = make_model()
TEACHER = make_model(emb_dim=24, num_encoder_layers=1)
TEACHER_PARAMS = TEACHER.init(jax.random.key(7))
OPTIMIZERS = {
    "adafactor": Adafactor(Constant(LEARNING_RATE), min_dim_size_to_factor=8),
    "adamw": AdamW(Constant(LEARNING_RATE)),
}


def run_steps(
    *, optimizer, num_microbatches=1, partitioner=None, num_steps=5, batch_size=8,
    objective=OBJECTIVE, student=STUDENT, teacher=TEACHER, teacher_params=TEACHER_PARAMS,
):  # fmt: skip
    """Trains a few steps; returns losses, gradient norms and the final parameters on the host."""
    partitioner = partitioner or Partitioner(data_parallelism=1, devices=(jax.devices()[0],))
    tx = optimizer.build()
    shardings = partitioner.param_shardings(student)
    params = jax.jit(student.init, out_shardings=shardings)(jax.random.key(0))
    abstract = jax.eval_shape(lambda p: train_step.init_train_state(p, tx), params)
    state_shardings = partitioner.state_shardings(abstract, shardings)
    state = jax.jit(lambda p: train_step.init_train_state(p, tx), out_shardings=state_shardings)(
        params
    )
    teacher_params = jax.device_put(teacher_params, partitioner.param_shardings(teacher))
    step = jax.jit(
        partitioner.annotate(
            train_step.make_train_step(
                student,
                teacher,
                objective,
                tx,
                num_microbatches=num_microbatches,
            )
        ),
        out_shardings=(state_shardings, partitioner.replicated),
    )
    losses, norms = [], []
    for index in range(num_steps):
        batch = partitioner.shard_batch(make_batch(batch_size, seed=index))
        state, metrics = step(state, teacher_params, batch, jax.random.key(index))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        norms.append(float(metrics["grad_norm"][0]))
    return np.array(losses), np.array(norms), jax.device_get(state.params)


def assert_equal_runs(one, other, num_steps=5):
    """Equal as the framework defines it: see docs/design/numbers.md."""
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1][0], other[1][0], rtol=1e-5)
    limit = 0.02 * num_steps * LEARNING_RATE
    chex.assert_trees_all_close(one[2], other[2], atol=limit, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow][: name != "adamw"]) for name in OPTIMIZERS]
)
@pytest.mark.parametrize("num_microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.pitfall(25)
def test_microbatches_do_not_change_loss_or_gradient(name, num_microbatches):
    """Per token, since microbatches have as many sequences but not as many tokens."""
    arguments = dict(
        optimizer=OPTIMIZERS[name],
        objective=Objective(GeneralizedJSD(beta=0.5), reduction="per_token"),
    )
    assert_equal_runs(
        run_steps(**arguments), run_steps(**arguments, num_microbatches=num_microbatches)
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow][: name != "adamw"]) for name in OPTIMIZERS]
)
@pytest.mark.parametrize("num_microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_eight_devices_equal_one(name, num_microbatches):
    optimizer = OPTIMIZERS[name]
    mesh = Partitioner(model_parallelism=2, devices=tuple(jax.devices()[:8]))
    assert mesh.mesh.shape == {"data": 4, "model": 2}
    assert_equal_runs(
        run_steps(optimizer=optimizer),
        run_steps(optimizer=optimizer, partitioner=mesh, num_microbatches=num_microbatches),
    )


def run_form(optimizer, *, is_loop, policy="none", **options):
    """`run_steps` of deeper models, with the parameters one by one whatever the form."""
    how = dict(scan_layers=is_loop, remat_policy=policy)
    student = make_model(num_encoder_layers=3, num_decoder_layers=2, **how)
    teacher = make_model(emb_dim=24, num_encoder_layers=2, **how)
    losses, norms, params = run_steps(
        optimizer=optimizer, student=student, teacher=teacher,
        teacher_params=teacher.init(jax.random.key(7)), **options,
    )  # fmt: skip
    return losses, norms, stacking.unstack(params)


FORM_OPTIMIZERS = OPTIMIZERS | {
    "clipped": Adafactor(Constant(LEARNING_RATE), min_dim_size_to_factor=8, max_grad_norm=0.1),
    "decayed": AdamW(Constant(LEARNING_RATE), weight_decay=1.0),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "adafactor" else pytest.param(name, marks=pytest.mark.slow)
        for name in FORM_OPTIMIZERS
    ],
)
def test_stacked_layers_are_updated_as_if_each_were_alone(name):
    optimizer = FORM_OPTIMIZERS[name]
    assert_equal_runs(run_form(optimizer, is_loop=False), run_form(optimizer, is_loop=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rules", "model_parallelism", "how"),
    [
        ("adafactor", "fsdp", 2, dict(is_loop=True, policy="minimal")),
        ("adamw", "standard", 2, dict(is_loop=True, policy="full")),
        ("adamw", "fsdp", 1, dict(is_loop=False, policy="full")),
    ],
)
def test_loops_and_rematerialisation_on_eight_devices(name, rules, model_parallelism, how):
    mesh = Partitioner(model_parallelism=model_parallelism, rules=rules)
    one = run_form(OPTIMIZERS[name], is_loop=False)
    assert_equal_runs(one, run_form(OPTIMIZERS[name], partitioner=mesh, **how))


def test_state_of_stacked_layers_lies_as_the_layers():
    student = make_model(num_encoder_layers=3, scan_layers=True)
    partitioner = Partitioner(model_parallelism=2, rules="fsdp")
    shardings = partitioner.param_shardings(student)
    tx = OPTIMIZERS["adafactor"].build()
    abstract = jax.eval_shape(
        lambda p: train_step.init_train_state(p, tx), student.abstract_params()
    )
    laid = partitioner.state_shardings(abstract, shardings)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract.opt_state),
            jax.tree.leaves(laid.opt_state),
            strict=True,
        )
    }
    kernel = "encoder/layers/mlp/wi_0/kernel"  # [layers, embed, mlp] = [3, 16, 32]
    rows = [entry for name, entry in found.items() if name.endswith(f"v_row/{kernel}")]
    columns = [entry for name, entry in found.items() if name.endswith(f"v_col/{kernel}")]
    assert rows == [((3, 16), PartitionSpec(None, "data"))]
    assert columns == [((3, 32), PartitionSpec(None, "model"))]


@pytest.mark.pitfall(29)
def test_tokens_are_counted_in_float32():
    """bfloat16 has no odd number above 256."""
    batch = make_batch(97, length=6)
    num_tokens = batch.loss_weights.sum()
    assert num_tokens > 256
    assert float(jnp.asarray(num_tokens, jnp.bfloat16)) != num_tokens
    weights = jnp.asarray(batch.loss_weights)
    metrics = jax.jit(train_step.loss_metrics)(
        jnp.ones_like(weights), batch, weights / weights.sum()
    )
    assert float(metrics["target_tokens"][0]) == num_tokens
    assert float(metrics["loss_per_token"][1]) == num_tokens
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], 1.0, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype(jnp.float32)}


@pytest.mark.pitfall(42)
def test_teacher_never_drops_out_and_student_does():
    teacher = make_model(dropout_rate=0.5)
    student = make_model(dropout_rate=0.5)
    batch = make_batch()
    weights = jnp.asarray(batch.loss_weights)
    params = STUDENT.init(jax.random.key(1))

    def values(model, teacher_model, key):
        loss = train_step.make_loss_fn(model, teacher_model, Objective(ForwardKL()))
        return jax.jit(loss)(params, params, batch, weights, key)[1]

    no_dropout = values(STUDENT, STUDENT, None)
    chex.assert_trees_all_equal(values(STUDENT, teacher, jax.random.key(0)), no_dropout)
    first, second = (values(student, teacher, jax.random.key(i)) for i in range(2))
    assert float(jnp.max(jnp.abs(first - second))) > 1e-3
    chex.assert_trees_all_equal(values(student, teacher, None), no_dropout)


@pytest.mark.pitfall(32)
def test_teacher_has_no_gradient_and_no_optimizer_state():
    tx = OPTIMIZERS["adamw"].build()
    state = train_step.init_train_state(STUDENT.init(jax.random.key(0)), tx)
    student_shapes = {leaf.shape for leaf in jax.tree.leaves(STUDENT.abstract_params())}
    teacher_only = {
        leaf.shape for leaf in jax.tree.leaves(TEACHER.abstract_params())
    } - student_shapes
    assert teacher_only
    assert not teacher_only & {leaf.shape for leaf in jax.tree.leaves(state)}
    loss = train_step.make_loss_fn(STUDENT, TEACHER, Objective(ForwardKL()))
    batch = make_batch()
    grads = jax.grad(
        lambda teacher: loss(state.params, teacher, batch, jnp.asarray(batch.loss_weights))[0]
    )(TEACHER_PARAMS)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.pitfall(40)
def test_the_teacher_is_used():
    batch = make_batch()
    weights = jnp.asarray(batch.loss_weights)
    params = STUDENT.init(jax.random.key(0))
    loss = jax.jit(train_step.make_loss_fn(STUDENT, TEACHER, Objective(ForwardKL())))
    other = jax.tree.map(lambda leaf: leaf * 1.1, TEACHER_PARAMS)
    one, two = (
        loss(params, TEACHER_PARAMS, batch, weights)[0],
        loss(params, other, batch, weights)[0],
    )
    assert abs(float(one) - float(two)) > 1e-3


def test_a_missing_teacher_is_refused_by_name():
    loss = train_step.make_loss_fn(STUDENT, None, Objective(ForwardKL()))
    batch = make_batch()
    with pytest.raises(ValueError, match=r"ForwardKL .* Set Experiment\.teacher"):
        jax.eval_shape(loss, STUDENT.abstract_params(), None, batch, batch.loss_weights)


@pytest.mark.pitfall(35)
def test_a_step_compiles_once():
    tx = OPTIMIZERS["adamw"].build()
    step = jax.jit(
        train_step.make_train_step(STUDENT, None, Objective(NegativeLogLikelihood()), tx)
    )
    state = train_step.init_train_state(STUDENT.init(jax.random.key(0)), tx)
    for index in range(3):
        state, _ = step(state, None, make_batch(seed=index), jax.random.key(index))
    assert step._cache_size() == 1


@pytest.mark.pitfall(28)
def test_a_fully_masked_sequence_counts_nowhere():
    batch = make_batch()
    weights = np.array(batch.loss_weights)
    weights[3] = 0
    masked = dataclasses.replace(batch, loss_weights=weights)
    rows = np.array([0, 1, 2, 4, 5, 6, 7])
    cropped = jax.tree.map(lambda leaf: leaf[rows], batch)
    step = jax.jit(train_step.make_eval_step(STUDENT, TEACHER, Objective(ForwardKL())))
    params = STUDENT.init(jax.random.key(0))
    one, two = step(params, TEACHER_PARAMS, masked), step(params, TEACHER_PARAMS, cropped)
    chex.assert_trees_all_close(one, two, rtol=1e-5)
    empty = dataclasses.replace(batch, loss_weights=np.zeros_like(weights))
    total, weight = step(params, TEACHER_PARAMS, empty)["loss"]
    assert float(total) == 0.0
    assert float(weight) == 0.0
