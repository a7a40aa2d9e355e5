"""The objective on hidden states: temperatures, weights, reductions, masks and microbatches."""

import contextvars
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_references import np_divergence, np_gradient, prefix_weights, unembed

from gkd_jax.objectives import (
    ForwardKL,
    GeneralizedJSD,
    NegativeLogLikelihood,
    Objective,
    Predictions,
    ReverseKL,
    final_weights,
    fused,
    fused_weighted_loss,
    weighted_loss,
)

B, T, D, V = 4, 6, 8, 13
LENGTHS = (6, 2, 0, 3)
DIVERGENCES = [NegativeLogLikelihood(), ForwardKL(), ReverseKL(), GeneralizedJSD(0.1)]
REDUCTIONS = ["per_sequence", "per_token"]


# Every test runs for both forms of the loss; the fused one in chunks of a few positions.
_form = contextvars.ContextVar("form")


@pytest.fixture(params=["plain", "fused"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setattr(fused, "MIN_CHUNK", 4)
    monkeypatch.setattr(fused, "CHUNK_ENTRIES", 5 * V)
    token = _form.set({"plain": weighted_loss, "fused": fused_weighted_loss}[request.param])
    yield request.param
    _form.reset(token)


def make_case(seed=0, lengths=LENGTHS, width=T):
    rng = np.random.default_rng(seed)
    shape = (len(lengths), width)
    return {
        "student_hidden": rng.normal(size=(*shape, D)).astype(np.float32),
        "teacher_hidden": rng.normal(size=(*shape, D + 1)).astype(np.float32),
        "student_kernel": rng.normal(size=(D, V)).astype(np.float32),
        "teacher_kernel": rng.normal(size=(D + 1, V)).astype(np.float32),
        "targets": rng.integers(0, V, shape).astype(np.int32),
        "loss_weights": prefix_weights(lengths, width),
    }


def loss_of(objective, case, weights):
    """The loss as a function of a case, with plain matrices for output layers."""
    needs_teacher = objective.divergence.needs_teacher
    return _form.get()(
        objective,
        student=Predictions(case["student_hidden"], case["student_kernel"], unembed),
        teacher=Predictions(case["teacher_hidden"], case["teacher_kernel"], unembed)
        if needs_teacher
        else None,
        targets=case["targets"],
        weights=weights,
    )


def run(objective, case, weights=None):
    """Loss, per-token values and gradients in hidden states and output layers of both."""
    if weights is None:
        weights = jitted_final_weights(case["loss_weights"], reduction=objective.reduction)
    # The reduction is all in the weights: one compilation serves both.
    return _run(
        _form.get(), dataclasses.replace(objective, reduction="per_sequence"), case, weights
    )


jitted_final_weights = jax.jit(final_weights, static_argnames="reduction")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(form, objective, case, weights):
    assert form is _form.get()
    floats = {k: case[k] for k in case if k.endswith(("hidden", "kernel"))}

    def loss_fn(floats, weights):
        return loss_of(objective, {**case, **floats}, weights)

    (loss, per_token), (gradients, of_weights) = jax.value_and_grad(
        loss_fn, argnums=(0, 1), has_aux=True
    )(floats, weights)
    return loss, per_token, {**gradients, "weights": of_weights}


# The reference in float64 NumPy.


def np_logits(case):
    """Logits of the student and of the teacher."""
    return [
        case[f"{whose}_hidden"].astype(np.float64) @ case[f"{whose}_kernel"].astype(np.float64)
        for whose in ("student", "teacher")
    ]


def np_per_token(objective, case):
    """Values, and gradients in the student's logits."""
    temperatures = (objective.student_temperature, objective.teacher_temperature)
    arguments = (objective.divergence, *np_logits(case), case["targets"], temperatures)
    return np_divergence(*arguments), np_gradient(*arguments)


def np_loss(objective, case):
    """The reduced loss and its gradient in the student's output layer, row by row."""
    values, of_logits = np_per_token(objective, case)
    outer = np.einsum("btd,btv->btdv", case["student_hidden"].astype(np.float64), of_logits)
    rows = [
        (values[b][w > 0], outer[b][w > 0]) for b, w in enumerate(case["loss_weights"]) if w.any()
    ]
    if objective.reduction == "per_token":
        return np.concatenate([v for v, _ in rows]).mean(), np.concatenate(
            [g for _, g in rows]
        ).mean(0)
    return np.mean([v.mean() for v, _ in rows]), np.mean([g.mean(0) for _, g in rows], axis=0)


@pytest.mark.pitfall(7)
@pytest.mark.pitfall(8)
@pytest.mark.pitfall(30)
@pytest.mark.pitfall(49)
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.5)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_loss_and_gradient_match_float64_numpy(divergence, reduction, temperatures):
    if not divergence.needs_teacher:
        temperatures = (temperatures[0], 1.0)
    objective = Objective(divergence, *temperatures, reduction)
    case = make_case()
    loss, per_token, gradients = run(objective, case)
    expected, of_kernel = np_loss(objective, case)
    assert loss.dtype == per_token.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=3e-6)
    np.testing.assert_allclose(
        per_token, np_per_token(objective, case)[0] * case["loss_weights"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(gradients["student_kernel"], of_kernel, rtol=1e-4, atol=1e-6)
    for name in ("teacher_hidden", "teacher_kernel", "weights"):
        np.testing.assert_array_equal(gradients[name], np.zeros_like(gradients[name]))


@pytest.mark.pitfall(8)
def test_each_temperature_is_applied_once_and_to_its_own_softmax():
    # Scaling one model's hidden states by 1/tau and its temperature tau must agree.
    case = make_case(1)
    weights = jitted_final_weights(case["loss_weights"], reduction="per_sequence")
    for name in ("student", "teacher"):
        tempered = Objective(GeneralizedJSD(0.5), **{f"{name}_temperature": 2.0})
        scaled = {**case, f"{name}_hidden": case[f"{name}_hidden"] / 2.0}
        one, one_per_token, _ = run(tempered, case, weights)
        other, other_per_token, _ = run(Objective(GeneralizedJSD(0.5)), scaled, weights)
        np.testing.assert_allclose(one, other, rtol=1e-6)
        np.testing.assert_allclose(one_per_token, other_per_token, rtol=1e-5, atol=1e-7)
        assert abs(one - run(Objective(GeneralizedJSD(0.5)), case, weights)[0]) > 1e-2


def test_final_weights_of_a_hand_computed_batch():
    loss_weights = prefix_weights([2, 1, 0], width=3)
    by_sequence = jitted_final_weights(loss_weights, reduction="per_sequence")
    expected = [[0.25, 0.25, 0], [0.5, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(by_sequence, expected, rtol=1e-7)
    by_token = jitted_final_weights(loss_weights, reduction="per_token")
    np.testing.assert_allclose(by_token, loss_weights / 3, rtol=1e-7)


@pytest.mark.pitfall(26)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equal_tokens_give_their_own_value_whatever_the_lengths(reduction):
    # Uniform logits: -log q = log V at each token, so a mean of any kind is log V.
    objective = Objective(NegativeLogLikelihood(), reduction=reduction)
    for lengths in [(6, 2, 0, 3), (1, 1, 1, 1), (0, 0, 6, 0)]:
        case = make_case(2, lengths=lengths)
        case["student_hidden"] = np.zeros_like(case["student_hidden"])
        loss, per_token, _ = run(objective, case)
        np.testing.assert_allclose(loss, math.log(V), rtol=1e-6)
        np.testing.assert_allclose(per_token, math.log(V) * case["loss_weights"], rtol=1e-6)


@pytest.mark.pitfall(28)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_fully_masked_sequence_does_not_count(divergence, reduction):
    objective = Objective(divergence, reduction=reduction, z_loss=1e-2)
    case = make_case(3, lengths=(6, 0, 3, 0))
    loss, _, gradients = run(objective, case)
    kept = {k: v if k.endswith("kernel") else v[[0, 2]] for k, v in case.items()}
    expected, _, expected_gradients = run(objective, kept)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(
        gradients["student_kernel"], expected_gradients["student_kernel"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.pitfall(28)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_fully_masked_batch_is_zero_and_not_nan(divergence, reduction):
    objective = Objective(divergence, reduction=reduction, z_loss=1e-2)
    loss, per_token, gradients = run(objective, make_case(3, lengths=(0, 0, 0, 0)))
    assert loss == 0.0
    for leaf in [per_token, *jax.tree.leaves(gradients)]:
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.pitfall(25)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_microbatches_sum_to_the_same_loss_and_gradient(divergence, reduction):
    objective = Objective(divergence, reduction=reduction, z_loss=1e-2)
    case = make_case(4)
    weights = jitted_final_weights(case["loss_weights"], reduction=reduction)
    loss, _, gradients = run(objective, case, weights)
    for num in (2, 4):
        parts = []
        for rows in np.split(np.arange(B), num):
            part = {k: v if k.endswith("kernel") else v[rows] for k, v in case.items()}
            parts.append(run(objective, part, weights[rows]))
        np.testing.assert_allclose(sum(p[0] for p in parts), loss, rtol=1e-6)
        summed = sum(p[2]["student_kernel"] for p in parts)
        np.testing.assert_allclose(summed, gradients["student_kernel"], rtol=1e-4, atol=1e-6)
        joined = np.concatenate([p[2]["student_hidden"] for p in parts])
        np.testing.assert_allclose(joined, gradients["student_hidden"], rtol=1e-4, atol=1e-6)


@pytest.mark.pitfall(30)
@pytest.mark.pitfall(52)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_a_batch_changes_nothing(reduction):
    objective = Objective(GeneralizedJSD(0.5), reduction=reduction, z_loss=1e-2)
    case = make_case(5)
    loss, _, gradients = run(objective, case)
    padded = {
        k: v if k.endswith("kernel") else np.pad(v, [(0, 0), (0, 5)] + [(0, 0)] * (v.ndim - 2))
        for k, v in case.items()
    }
    padded_loss, _, padded_gradients = run(objective, padded)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(
        padded_gradients["student_kernel"], gradients["student_kernel"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.pitfall(48)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sampled_outputs_are_divided_by_their_own_lengths(reduction):
    # A rollout shortened the outputs; those of the data were longer. Only the new ones count.
    objective = Objective(ForwardKL(), reduction=reduction)
    case = make_case(6, lengths=(6, 6, 6, 6))
    sampled = {**case, "loss_weights": prefix_weights([1, 2, 3, 1], T)}
    loss, _, _ = run(objective, sampled)
    np.testing.assert_allclose(loss, np_loss(objective, sampled)[0], rtol=3e-6)
    total = jitted_final_weights(sampled["loss_weights"], reduction=reduction).sum()
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)


@pytest.mark.pitfall(15)
@pytest.mark.pitfall(24)
@pytest.mark.parametrize("token", [0, 1])
def test_tokens_count_by_their_weight_whatever_their_id(token):
    # Were 0 the padding id, or eos and padding one id, these targets would be "padding".
    objective = Objective(NegativeLogLikelihood())
    case = make_case(7, lengths=(6, 3, 1, 2))
    case["targets"] = np.full_like(case["targets"], token)
    loss, per_token, _ = run(objective, case)
    np.testing.assert_allclose(loss, np_loss(objective, case)[0], rtol=3e-6)
    np.testing.assert_array_equal(np.asarray(per_token) > 0, case["loss_weights"] > 0)


@pytest.mark.pitfall(14)
@pytest.mark.pitfall(51)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_hidden_state_of_a_position_changes_its_own_token_alone(divergence):
    objective = Objective(divergence)
    case = make_case(8, lengths=(6, 4, 5, 3))
    _, before, _ = run(objective, case)
    for t in range(T):
        moved = {**case, "student_hidden": case["student_hidden"].copy()}
        moved["student_hidden"][:, t] += 1.0
        _, after, _ = run(objective, moved)
        expected = np.zeros((B, T), bool)
        expected[:, t] = case["loss_weights"][:, t] > 0
        np.testing.assert_array_equal(np.asarray(before != after), expected)


@pytest.mark.pitfall(14)
def test_likelihood_of_a_target_is_read_at_its_own_position():
    case = make_case(9, lengths=(6, 6, 6, 6))
    _, before, _ = run(Objective(NegativeLogLikelihood()), case)
    for t in range(T):
        targets = case["targets"].copy()
        targets[:, t] = (targets[:, t] + 1) % V
        _, after, _ = run(Objective(NegativeLogLikelihood()), {**case, "targets": targets})
        expected = np.zeros((B, T), bool)
        expected[:, t] = True
        np.testing.assert_array_equal(np.asarray(before != after), expected)


@pytest.mark.pitfall(22)
@pytest.mark.parametrize("divergence", DIVERGENCES[1:], ids=str)
def test_sampled_tokens_themselves_enter_no_divergence(divergence):
    case = make_case(10)
    one = run(Objective(divergence), case)
    other = run(Objective(divergence), {**case, "targets": (case["targets"] + 1) % V})
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.pitfall(27)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_positions_of_weight_zero_poison_nothing(divergence, poison):
    objective = Objective(divergence, z_loss=1e-2)
    case = make_case(11)
    expected = run(objective, case)
    off = case["loss_weights"] == 0
    for name in ("student_hidden", "teacher_hidden"):
        case[name] = np.where(off[..., None], np.float32(poison), case[name])
    for a, b in zip(jax.tree.leaves(run(objective, case)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.pitfall(29)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_are_counted_in_float32(reduction):
    # In bfloat16 256 + 1 is 256.
    loss_weights = jnp.asarray(prefix_weights([1000, 300, 257], width=1000), jnp.bfloat16)
    weights = jitted_final_weights(loss_weights, reduction=reduction)
    assert weights.dtype == jnp.float32
    expected = 1 / 1557 if reduction == "per_token" else 1 / (3 * 257)
    np.testing.assert_allclose(weights[2, :257], np.full(257, expected), rtol=1e-6)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)


@pytest.mark.pitfall(29)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_bfloat16_hidden_states_give_float32_losses(divergence):
    case = make_case(12)
    for name in ("student_hidden", "teacher_hidden", "student_kernel", "teacher_kernel"):
        case[name] = jnp.asarray(case[name], jnp.bfloat16)

    @jax.jit
    def run_bfloat16(student_hidden):
        weights = final_weights(case["loss_weights"], reduction="per_sequence")
        return loss_of(Objective(divergence), case | {"student_hidden": student_hidden}, weights)

    (loss, per_token), gradient = jax.value_and_grad(run_bfloat16, has_aux=True)(
        case["student_hidden"]
    )
    assert (loss.dtype, per_token.dtype) == (jnp.float32, jnp.float32)
    assert gradient.dtype == jnp.bfloat16
    wide = {k: np.asarray(v, np.float32) if k != "targets" else v for k, v in case.items()}
    np.testing.assert_allclose(loss, np_loss(Objective(divergence), wide)[0], rtol=1e-5)


def test_z_loss_is_of_the_logits_without_temperature():
    case = make_case(13)
    weights = jitted_final_weights(case["loss_weights"], reduction="per_sequence")
    without = run(Objective(ForwardKL(), student_temperature=2.0), case, weights)
    with_z = run(Objective(ForwardKL(), student_temperature=2.0, z_loss=0.1), case, weights)
    logits = case["student_hidden"].astype(np.float64) @ case["student_kernel"]
    log_z = np.log(np.exp(logits).sum(-1))
    expected = 0.1 * (np.asarray(weights) * log_z**2).sum()
    np.testing.assert_allclose(with_z[0] - without[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(with_z[1], without[1])
    q = np.exp(logits - log_z[..., None])
    of_logits = 0.2 * (np.asarray(weights) * log_z)[..., None] * q
    of_kernel = np.einsum("btd,btv->dv", case["student_hidden"].astype(np.float64), of_logits)
    difference = with_z[2]["student_kernel"] - without[2]["student_kernel"]
    np.testing.assert_allclose(difference, of_kernel, rtol=1e-4, atol=1e-6)


def test_weights_scale_and_may_be_negative():
    case = make_case(14)
    weights = jitted_final_weights(case["loss_weights"], reduction="per_sequence")
    loss, per_token, gradients = run(Objective(ReverseKL()), case, weights)
    scaled, same, of_scaled = run(Objective(ReverseKL()), case, -3.0 * weights)
    np.testing.assert_allclose(scaled, -3.0 * loss, rtol=1e-6)
    np.testing.assert_array_equal(per_token, same)
    np.testing.assert_allclose(
        of_scaled["student_kernel"], -3.0 * gradients["student_kernel"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.pitfall(40)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"divergence": ForwardKL},
            r"Objective\.divergence must be a Divergence; .*@ForwardKL\(\)",
        ),
        ({"divergence": "jsd"}, r"Objective\.divergence .* got 'jsd'"),
        ({"student_temperature": 0.0}, r"Objective\.student_temperature .* got 0\.0.*Greedy"),
        ({"teacher_temperature": 0}, r"Objective\.teacher_temperature .* got 0.*Greedy"),
        ({"teacher_temperature": -1.0}, r"Objective\.teacher_temperature .* got -1\.0"),
        ({"teacher_temperature": math.nan}, r"Objective\.teacher_temperature .* got nan"),
        ({"student_temperature": math.inf}, r"Objective\.student_temperature .* got inf"),
        ({"reduction": "mean"}, r"one of per_sequence, per_token; got 'mean'"),
        ({"z_loss": -1e-4}, r"Objective\.z_loss .* got -0\.0001"),
        (
            {"divergence": NegativeLogLikelihood(), "teacher_temperature": 0.1},
            r"Objective\.teacher_temperature must be 1\.0 with NegativeLogLikelihood",
        ),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"divergence": ForwardKL(), **settings})


@pytest.mark.pitfall(40)
def test_teacher_is_given_exactly_where_it_is_needed():
    case = make_case(15)
    arguments = {
        "student": Predictions(case["student_hidden"], case["student_kernel"], unembed),
        "targets": case["targets"],
        "weights": case["loss_weights"],
    }
    teacher = Predictions(case["teacher_hidden"], case["teacher_kernel"], unembed)
    with pytest.raises(ValueError, match="ForwardKL compares the student with a teacher"):
        _form.get()(Objective(ForwardKL()), **arguments, teacher=None)
    with pytest.raises(ValueError, match="NegativeLogLikelihood reads no teacher"):
        _form.get()(Objective(NegativeLogLikelihood()), **arguments, teacher=teacher)


def test_shapes_and_vocabularies_that_do_not_fit_are_refused():
    case = make_case(16)
    smaller = {**case, "teacher_kernel": case["teacher_kernel"][:, :-1]}
    with pytest.raises(ValueError, match=r"12 \(teacher\) and 13 \(student\)"):
        loss_of(Objective(ForwardKL()), smaller, case["loss_weights"])
    with pytest.raises(ValueError, match="weights must have the shape"):
        loss_of(Objective(ForwardKL()), case, case["loss_weights"][:, 1:])
    with pytest.raises(ValueError, match="one of per_sequence, per_token"):
        final_weights(case["loss_weights"], reduction="sum")
