"""Schedules at given steps, and optimizers against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax.distillation import optimizers


def at(schedule, *steps):
    return np.asarray([jax.jit(schedule)(jnp.int32(step)) for step in steps])


@pytest.mark.parametrize(
    ("schedule", "steps", "rates"),
    [
        (optimizers.Constant(0.5), (0, 1, 10**6), (0.5, 0.5, 0.5)),
        (optimizers.Constant(0.4, warmup_steps=4), (0, 1, 3, 4, 99), (0.1, 0.2, 0.4, 0.4, 0.4)),
        (
            optimizers.InverseSquareRoot(0.3, warmup_steps=4),
            (0, 3, 4, 16, 400),
            (0.075, 0.3, 0.3, 0.15, 0.03),
        ),
        (
            optimizers.Linear(1.0, decay_steps=12, warmup_steps=2, end=0.5),
            (0, 1, 2, 7, 11, 12, 50),
            (0.5, 1.0, 1.0, 0.75, 0.55, 0.5, 0.5),
        ),
        (optimizers.Linear(1.0, decay_steps=4), (0, 1, 2, 3, 4), (1.0, 0.75, 0.5, 0.25, 0.0)),
        (
            optimizers.Cosine(1.0, decay_steps=10, warmup_steps=2, end=0.2),
            (0, 1, 2, 4, 6, 8, 10, 20),
            (0.5, 1.0, 1.0, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2, 0.2),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedule_has_the_expected_rate_at_each_step(schedule, steps, rates):
    got = at(schedule, *steps)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, rates, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "schedule",
    [
        optimizers.Constant(1e-3, warmup_steps=1000),
        optimizers.InverseSquareRoot(1e-3, warmup_steps=1000),
        optimizers.Linear(1e-3, decay_steps=5000, warmup_steps=1000),
        optimizers.Cosine(1e-3, decay_steps=5000, warmup_steps=1000),
    ],
    ids=lambda value: type(value).__name__,
)
def test_first_update_has_a_small_rate_above_zero(schedule):
    np.testing.assert_allclose(at(schedule, 0), [1e-6], rtol=1e-6)
    tx = optimizers.AdamW(schedule).build()
    params = {"w": jnp.ones((2, 2))}
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-6 * np.ones((2, 2)), rtol=1e-5)


def make_trees(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"wide": (130, 140), "tall": (150, 129), "small": (5, 200), "scale": (300,)}
    params = {name: rng.normal(0, 0.05, shape).astype(dtype) for name, shape in shapes.items()}
    grads = [
        {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    return params, grads


def apply(tx, params, grads):
    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    history = []
    for grad in grads:
        params, state = step(params, state, grad)
        history.append(jax.device_get(params))
    return history, state


def numpy_adafactor(param, grads, rates, *, factored_from=128, clip=1.0, scale=True):
    """Adafactor in float64, from the paper's Algorithms 4 and 5 and T5X's defaults."""
    x = param.astype(np.float64)
    factored = x.ndim == 2 and min(x.shape) >= factored_from
    row = col = full = 0.0
    out = []
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        g = grad.astype(np.float64)
        beta = 1.0 - t**-0.8
        squared = g**2 + 1e-30
        if factored:
            row = beta * row + (1 - beta) * squared.mean(1)
            col = beta * col + (1 - beta) * squared.mean(0)
            v = np.outer(row, col) / row.mean()
        else:
            full = beta * full + (1 - beta) * squared
            v = full
        u = g / np.sqrt(v)
        if clip is not None:
            u = u / max(1.0, np.sqrt((u**2).mean()) / clip)
        size = max(1e-3, np.sqrt((x**2).mean())) if scale else 1.0
        x = x - rate * size * u
        out.append(x)
    return out


@pytest.mark.parametrize("name", ["wide", "tall", "small", "scale"])
def test_adafactor_matches_numpy_factored_and_not(name):
    params, grads = make_trees()
    schedule = optimizers.Constant(0.1, warmup_steps=2)
    history, state = apply(optimizers.Adafactor(schedule).build(), params, grads)
    want = numpy_adafactor(params[name], [g[name] for g in grads], [0.05, 0.1, 0.1])
    for got, expected in zip(history, want, strict=True):
        moved = np.abs(expected - params[name]).max()
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=2e-6 * moved + 1e-8)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert {(130,), (140,), (150,), (129,), (5, 200), (300,)} <= shapes
    assert (130, 140) not in shapes  # factored: no full second moment is kept


def test_adafactor_without_scale_or_clipping_matches_numpy():
    params, grads = make_trees(1)
    optimizer = optimizers.Adafactor(
        optimizers.Constant(0.01), clipping_threshold=None, multiply_by_parameter_scale=False
    )
    history, _ = apply(optimizer.build(), params, grads)
    want = numpy_adafactor(
        params["wide"], [g["wide"] for g in grads], [0.01] * 3, clip=None, scale=False
    )
    np.testing.assert_allclose(history[-1]["wide"], want[-1], rtol=0, atol=1e-7)


def test_adafactor_without_momentum_keeps_none():
    params, _ = make_trees()
    size = lambda opt: sum(x.size for x in jax.tree.leaves(opt.build().init(params)))  # noqa: E731
    plain = size(optimizers.Adafactor(optimizers.Constant(0.1)))
    momentum = size(optimizers.Adafactor(optimizers.Constant(0.1), momentum=0.9))
    total = sum(x.size for x in params.values())
    assert plain < total / 10
    assert total <= momentum - plain <= total + 8  # and a counter


def numpy_adamw(param, grads, *, rate, b1, b2, eps, decay):
    x, m, v = param.astype(np.float64), 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        g = grad.astype(np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        x = x - rate * (u + decay * x)
    return x


def test_adamw_matches_numpy_and_spares_norms():
    params, grads = make_trees(2)
    optimizer = optimizers.AdamW(
        optimizers.Constant(0.01), b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1
    )
    history, _ = apply(optimizer.build(), params, grads)
    for name, decay in [("wide", 0.1), ("small", 0.1), ("scale", 0.0)]:
        want = numpy_adamw(
            params[name], [g[name] for g in grads], rate=0.01, b1=0.8, b2=0.95, eps=1e-6,
            decay=decay,
        )  # fmt: skip
        np.testing.assert_allclose(history[-1][name], want, rtol=0, atol=1e-7)


def test_decay_mask_names_kernels_only():
    params = {
        "encoder": {
            "layers": {
                "attention": {"query": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}},
                "pre_mlp_layer_norm": {"scale": jnp.zeros((2, 4))},
            },
            "relpos_bias": {"rel_embedding": jnp.zeros((2, 8))},
        },
        "token_embedder": {"embedding": jnp.zeros((16, 4))},
    }
    mask = optimizers.decay_mask(params)
    assert mask == {
        "encoder": {
            "layers": {
                "attention": {"query": {"kernel": True, "bias": False}},
                "pre_mlp_layer_norm": {"scale": False},
            },
            "relpos_bias": {"rel_embedding": False},
        },
        "token_embedder": {"embedding": True},
    }


@pytest.mark.parametrize("make", [optimizers.Adafactor, optimizers.AdamW])
def test_state_of_bfloat16_parameters_is_float32(make):
    params = {"w": jnp.ones((128, 128), jnp.bfloat16), "b": jnp.ones((3,), jnp.bfloat16)}
    tx = make(optimizers.Constant(0.1)).build()
    state = jax.jit(tx.init)(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32), leaf
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def test_bfloat16_gradients_give_the_update_of_their_float32_values():
    params, grads = make_trees(3)
    params = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), params)
    low = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), g) for g in grads]
    high = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in low]
    tx = optimizers.Adafactor(optimizers.Constant(0.1)).build()
    for a, b in zip(
        jax.tree.leaves(apply(tx, params, low)[0]),
        jax.tree.leaves(apply(tx, params, high)[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [optimizers.Adafactor, optimizers.AdamW])
def test_max_grad_norm_clips_the_global_norm_first(make):
    params, grads = make_trees(4)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads[0].values()))
    # Large eps makes Adam's first update depend on the gradient's size; momentum after a first
    # large gradient does so for Adafactor's second moment.
    extra = {"eps": 1.0} if make is optimizers.AdamW else {}
    rate = optimizers.Constant(0.1)
    clipped, _ = apply(make(rate, max_grad_norm=2.0, **extra).build(), params, grads[:2])
    scaled = [jax.tree.map(lambda x: x * np.float32(2.0 / norm), grads[0])]
    second = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads[1].values()))
    scaled.append(jax.tree.map(lambda x: x * np.float32(2.0 / second), grads[1]))
    want, _ = apply(make(rate, **extra).build(), params, scaled)
    plain, _ = apply(make(rate, **extra).build(), params, grads[:2])
    for name in params:
        np.testing.assert_allclose(clipped[1][name], want[1][name], rtol=1e-5, atol=1e-7)
    if make is optimizers.AdamW:
        assert np.abs(clipped[1]["wide"] - plain[1]["wide"]).max() > 1e-3
    loose, _ = apply(make(rate, max_grad_norm=1e6, **extra).build(), params, grads[:2])
    for name in params:
        np.testing.assert_allclose(loose[1][name], plain[1][name], rtol=1e-6, atol=1e-8)


SCHEDULE = optimizers.Constant(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.Constant(-0.1), r"Constant\.learning_rate .* got -0\.1"),
        (lambda: optimizers.Constant(float("nan")), r"Constant\.learning_rate .* got nan"),
        (lambda: optimizers.Constant(0.1, warmup_steps=-1), r"Constant\.warmup_steps .* got -1"),
        (lambda: optimizers.InverseSquareRoot(0.1, warmup_steps=0), r"at least 1; got 0"),
        (lambda: optimizers.Cosine(0.1, 10, warmup_steps=10), r"decay_steps .* got 10 and 10"),
        (lambda: optimizers.Linear(0.1, 10, end=0.5), r"Linear\.end .* got 0\.5 and 0\.1"),
        (lambda: optimizers.Adafactor(0.001), r"Adafactor\.schedule .* got 0\.001"),
        (lambda: optimizers.Adafactor(SCHEDULE, decay_rate=1.0), r"decay_rate .* got 1\.0"),
        (lambda: optimizers.Adafactor(SCHEDULE, clipping_threshold=0.5), r"clipping_threshold"),
        (lambda: optimizers.Adafactor(SCHEDULE, max_grad_norm=0.0), r"max_grad_norm .* got 0\.0"),
        (lambda: optimizers.AdamW(SCHEDULE, b2=1.0), r"AdamW\.b2 .* got 1\.0"),
        (lambda: optimizers.AdamW(SCHEDULE, weight_decay=-1.0), r"weight_decay .* got -1\.0"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
