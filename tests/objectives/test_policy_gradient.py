"""The policy gradient as a term of the loss: REINFORCE by hand in float64, and alpha's ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.objectives import (
    ForwardKL,
    Objective,
    PolicyGradient,
    Predictions,
    ReverseKL,
    WeightedSum,
    final_weights,
    fused_weighted_loss,
    token_advantages,
    token_divergence,
    weighted_loss,
    with_policy_gradient,
)
from gkd_jax.objectives.policy_gradient import divergence_alone

B, T, D, V = 4, 5, 3, 7
LENGTHS = np.array([5, 1, 3, 4])
COUNTS = (np.arange(T) < LENGTHS[:, None]).astype(np.float32)
RETURNS = np.array([1.5, -0.5, 0.0, 2.0], np.float32)
RNG = np.random.default_rng(0)
HIDDEN, HEAD = (RNG.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, V)))
TEACHER_HEAD = RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)


def unembed(head, hidden):
    return hidden @ head


def loss_and_gradient(form, objective, returns=RETURNS):
    """The loss as training makes it, and its gradients of hidden states and head."""
    reduction = objective.reduction
    weights = final_weights(jnp.asarray(COUNTS), reduction=reduction)
    advantages = None
    if objective.divergence.needs_advantages:
        advantages = token_advantages(jnp.asarray(returns), COUNTS, reduction=reduction)

    def loss(trained):
        teacher = Predictions(jnp.asarray(HIDDEN), TEACHER_HEAD, unembed)
        return form(
            objective,
            student=Predictions(*trained, unembed),
            teacher=teacher if objective.divergence.needs_teacher else None,
            targets=TARGETS,
            weights=weights,
            advantages=advantages,
        )

    return jax.value_and_grad(loss, has_aux=True)((jnp.asarray(HIDDEN), jnp.asarray(HEAD)))


def np_reinforce(temperature=1.0):
    """Mean over outputs of -R sum_t grad log q(y_t), by hand in float64."""
    of_hidden, of_head = np.zeros((B, T, D)), np.zeros((D, V))
    for b in range(B):
        for t in range(LENGTHS[b]):
            h = HIDDEN[b, t].astype(np.float64)
            logits = h @ HEAD.astype(np.float64) / temperature
            q = np.exp(logits - logits.max())
            q /= q.sum()
            of_logits = -RETURNS[b] * (np.eye(V)[TARGETS[b, t]] - q) / temperature / B
            of_head += np.outer(h, of_logits)
            of_hidden[b, t] = HEAD.astype(np.float64) @ of_logits
    return of_hidden, of_head


@pytest.mark.parametrize("form", [weighted_loss, fused_weighted_loss])
@pytest.mark.parametrize(("reduction", "temperature"), [("per_sequence", 1.0), ("per_token", 0.7)])
def test_alpha_0_is_reinforce(form, reduction, temperature):
    """Whatever the reduction of the loss: a return is that of a whole output."""
    objective = Objective(
        ForwardKL(), student_temperature=temperature, teacher_temperature=0.5, reduction=reduction
    )
    objective = with_policy_gradient(objective, 0.0)
    assert not objective.divergence.needs_teacher
    (loss, _), gradients = loss_and_gradient(form, objective)
    assert loss == 0
    for one, expected in zip(gradients, np_reinforce(temperature), strict=True):
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_alpha_1_is_the_objective_itself():
    objective = Objective(ReverseKL(), reduction="per_token")
    assert with_policy_gradient(objective, 1.0) is objective


def test_alpha_between_is_the_weighted_sum():
    distillation, reinforce, both = (
        with_policy_gradient(Objective(ReverseKL()), alpha) for alpha in (1.0, 0.0, 0.25)
    )
    assert both.divergence.needs_teacher
    (of_divergence, per_token), gradients = loss_and_gradient(weighted_loss, distillation)
    _, policy = loss_and_gradient(weighted_loss, reinforce)
    (loss, values), mixed = loss_and_gradient(weighted_loss, both)
    np.testing.assert_allclose(loss, 0.25 * of_divergence, rtol=1e-6)
    for one, left, right in zip(mixed, gradients, policy, strict=True):
        np.testing.assert_allclose(one, 0.25 * left + 0.75 * right, rtol=1e-5, atol=1e-6)
    # The divergence is found again in the values of the sum.
    np.testing.assert_allclose(divergence_alone(both.divergence, values), per_token, rtol=1e-6)
    assert divergence_alone(reinforce.divergence, values) is None
    assert divergence_alone(ReverseKL(), values) is None


@pytest.mark.pitfall(9)
def test_the_gradient_of_a_return_is_unbiased():
    """Over all outputs of a token, weighted by their probability: that of minus the mean reward."""
    logits = jnp.asarray(RNG.normal(size=V), jnp.float32)
    rewards = jnp.asarray(RNG.normal(size=V), jnp.float32)
    q = jax.nn.softmax(logits)

    def of_every_output(logits, baseline):
        advantages = rewards - baseline
        rows = jnp.tile(logits, (V, 1))
        every = jnp.arange(V, dtype=jnp.int32)
        values = token_divergence(PolicyGradient(), rows, None, every, advantages=advantages)
        return jnp.sum(jax.lax.stop_gradient(q) * values)

    expected = jax.grad(lambda logits: -jax.nn.softmax(logits) @ rewards)(logits)
    for baseline in (0.0, 3.0):
        found = jax.grad(of_every_output)(logits, baseline)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    # An advantage that the logits themselves made is held fixed all the same.
    def of_own_advantage(logits):
        own = jax.nn.log_softmax(logits)[:1]
        rows, first = logits[None], jnp.zeros(1, jnp.int32)
        return token_divergence(PolicyGradient(), rows, None, first, advantages=own)[0]

    by_hand = -jnp.log(q[0]) * (jnp.eye(V)[0] - q)
    np.testing.assert_allclose(jax.grad(of_own_advantage)(logits), by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("divergence", "advantages", "message"),
    [
        (PolicyGradient(), None, "PolicyGradient weighs output tokens .* got none"),
        (
            WeightedSum((ReverseKL(), PolicyGradient()), (1.0, 1.0)), None,
            "WeightedSum weighs output tokens .* got none",
        ),
        (ReverseKL(), np.ones(2), "ReverseKL reads no advantages; got some"),
        (PolicyGradient(), np.ones(3), r"shape of the targets; got \(3,\) and \(2,\)"),
    ],
)  # fmt: skip
def test_advantages_that_are_missing_or_lost_are_refused(divergence, advantages, message):
    logits = np.zeros((2, V), np.float32)
    with pytest.raises(ValueError, match=message):
        token_divergence(
            divergence,
            logits,
            logits if divergence.needs_teacher else None,
            np.zeros(2, np.int32),
            advantages=advantages,
        )
