"""MiniLLM's returns and weights: loops in float64, and the gradient of the KL of whole outputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.objectives import (
    Objective,
    ReverseKL,
    importance_weights,
    returns_to_go,
    token_divergence,
    with_returns,
)

RNG = np.random.default_rng(0)
LENGTHS = np.array([5, 1, 3])
COUNTS = (np.arange(5) < LENGTHS[:, None]).astype(np.float32)
LOG_Q, LOG_P = (np.log(RNG.uniform(0.01, 0.9, (3, 5))).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("length_normalized", [True, False])
def test_returns_by_loops(length_normalized):
    """What is behind the end of an output, NaN included, is not read."""
    log_ratio = np.where(COUNTS > 0, LOG_P - LOG_Q, np.nan)
    expected = np.zeros((3, 5))
    for b, t in itertools.product(range(3), range(5)):
        following = [float(log_ratio[b, u]) for u in range(t + 1, LENGTHS[b])]
        if following:
            expected[b, t] = np.mean(following) if length_normalized else np.sum(following)
    found = returns_to_go(log_ratio, COUNTS, length_normalized=length_normalized)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(found)[expected == 0] == 0)


def test_importance_by_hand():
    found = importance_weights(LOG_Q, LOG_P, COUNTS, teacher_share=0.2)
    q, p = np.exp(LOG_Q.astype(np.float64)), np.exp(LOG_P.astype(np.float64))
    expected = np.where(COUNTS > 0, q / (0.8 * q + 0.2 * p), 1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The most that it can be, where the teacher excludes the token; and the least.
    ends = importance_weights(
        np.array([[0.0, -np.inf]]), np.array([[-np.inf, 0.0]]), np.ones((1, 2)), teacher_share=0.2
    )
    np.testing.assert_allclose(ends, [[1.25, 0.0]], rtol=1e-6)


@pytest.mark.pitfall(9)
def test_mean_gradient_is_that_of_the_reverse_kl_of_whole_outputs():
    """Over all outputs of three tokens from three, by probability; returns are held fixed."""
    size, length = 3, 3
    outputs = np.array(list(itertools.product(range(size), repeat=length)), np.int32)
    # Logits of each prefix: its number in base 4, the token before counting most.
    prefix = np.zeros((len(outputs), length), np.int64)
    for t in range(1, length):
        prefix[:, t] = prefix[:, t - 1] * 4 + outputs[:, t - 1] + 1
    student = RNG.normal(size=(16, size))
    teacher = RNG.normal(size=(16, size))

    def np_log_probs(table):
        log_probs = table - np.log(np.sum(np.exp(table), axis=1, keepdims=True))
        return log_probs[prefix, outputs]

    def np_kl(table):
        log_q, log_p = np_log_probs(table).sum(1), np_log_probs(teacher).sum(1)
        return np.sum(np.exp(log_q) * (log_q - log_p))

    expected, step = np.zeros_like(student), 1e-6
    for index in np.ndindex(*student.shape):
        shift = np.zeros_like(student)
        shift[index] = step
        expected[index] = (np_kl(student + shift) - np_kl(student - shift)) / (2 * step)

    log_q, log_p = (np_log_probs(table).astype(np.float32) for table in (student, teacher))
    probability = np.exp(log_q.sum(1, keepdims=True))
    objective = with_returns(Objective(ReverseKL()))

    def estimate(table):
        logits = table[prefix]
        of_tokens = jnp.take_along_axis(jax.nn.log_softmax(logits), outputs[..., None], axis=-1)[
            ..., 0
        ]
        advantages = returns_to_go(
            log_p - of_tokens, np.ones(outputs.shape), length_normalized=False
        )
        values = token_divergence(
            objective.divergence,
            logits,
            jnp.asarray(teacher[prefix], jnp.float32),
            outputs,
            advantages=advantages,
        )
        return jnp.sum(probability * values)

    found = jax.jit(jax.grad(estimate))(jnp.asarray(student, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    # The long part matters.
    assert np.abs(expected).max() > 0.05
