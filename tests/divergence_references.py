"""Shared by several tests of objectives: one of every divergence, float64 definitions, cases.

A new divergence needs two entries here: an instance in `STRICT_OTHERS` (or `OTHERS`), and its
definition in `_np_value`. All tests then run over it.
"""

import jax.numpy as jnp
import numpy as np

from gkd_jax.objectives import (
    AlphaDivergence,
    ClippedForwardKL,
    Divergence,
    EntropyAware,
    ForwardKL,
    GeneralizedJSD,
    NegativeLogLikelihood,
    RenyiDivergence,
    ReverseKL,
    SampledReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    WeightedSum,
)

BETAS = (0.1, 0.5, 0.9)
TEMPERATURES = [(1.0, 1.0), (2.0, 1.0), (1.0, 0.1), (0.7, 1.3)]

PAPERS = [
    NegativeLogLikelihood(),
    ForwardKL(),
    ReverseKL(),
    *(GeneralizedJSD(beta) for beta in BETAS),
    GeneralizedJSD(0.9, normalized=True),
]
# Those of rivals and siblings: the strict ones are not negative, and 0 at P = Q alone.
STRICT_OTHERS = [
    TotalVariation(),
    SkewForwardKL(0.1),
    SkewForwardKL(0.7),
    SkewReverseKL(0.1),
    SkewReverseKL(0.7),
    AlphaDivergence(0.2),
    AlphaDivergence(0.5),
    AlphaDivergence(0.9),
    RenyiDivergence(0.3),
    RenyiDivergence(2.0),
    EntropyAware(threshold=1.5, forward_weight=0.5),
]
MIXED = WeightedSum((ForwardKL(), NegativeLogLikelihood()), (0.3, 0.7))
OTHERS = [*STRICT_OTHERS, ClippedForwardKL(0.05), MIXED]
EVERY = [*PAPERS, *OTHERS, SampledReverseKL()]
EVERY_WITH_TEACHER = [divergence for divergence in EVERY if divergence.needs_teacher]
# One objective that sees whatever any of them does, at the price of one compilation.
ALL_IN_ONE = WeightedSum(tuple(EVERY), tuple(0.5 + 0.1 * i for i in range(len(EVERY))))


def unembed(kernel, hidden):
    """The output layer accumulates in float32, as the models' does."""
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def random_case(seed, *, shape=(3, 5), vocab=11, scale=2.0):
    """Logits of student and teacher, and targets."""
    rng = np.random.default_rng(seed)
    student = (scale * rng.normal(size=(*shape, vocab))).astype(np.float32)
    teacher = (scale * rng.normal(size=(*shape, vocab))).astype(np.float32)
    return student, teacher, rng.integers(0, vocab, shape).astype(np.int32)


def prefix_weights(lengths, width):
    """1 on the first so many positions of each row."""
    return (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.float32)


def np_softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    exps = np.exp(scaled - scaled.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def np_terms(p, q):
    """p log(p / q), 0 where p is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0)


def np_kl(p, q):
    return np_terms(p, q).sum(-1)


def np_products(p, q, alpha):
    """p^alpha q^(1 - alpha), 0 where both are."""
    return np.where(p > 0, p**alpha * q ** (1 - alpha), 0.0)


def np_at_target(probs, is_target):
    return probs[is_target].reshape(probs.shape[:-1])


def np_value(divergence: Divergence, q, p, is_target, held=None) -> np.ndarray:
    """Textbook definitions in float64, of the probabilities of one row per token.

    Args:
      divergence: any in `EVERY`.
      q: the student's probabilities.
      p: the teacher's; None if the divergence needs no teacher.
      is_target: True on the entry of the output token.
      held: student's probabilities that the gradient does not see, if it is not that of the value:
        returns a function of q that has the gradient instead.
    """
    if isinstance(divergence, WeightedSum):
        return sum(
            weight * np_value(one, q, p, is_target, held)
            for one, weight in zip(divergence.divergences, divergence.weights, strict=True)
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return _np_value(divergence, q, p, is_target, held)


def _np_value(divergence, q, p, is_target, held):
    match divergence:
        case NegativeLogLikelihood():
            return -np.log(np_at_target(q, is_target))
        case ForwardKL():
            return np_kl(p, q)
        case ReverseKL():
            return np_kl(q, p)
        case GeneralizedJSD(beta, normalized):
            mixture = beta * p + (1 - beta) * q
            value = beta * np_kl(p, mixture) + (1 - beta) * np_kl(q, mixture)
            return value / (beta * (1 - beta)) if normalized else value
        case TotalVariation():
            return 0.5 * np.abs(p - q).sum(-1)
        case SkewForwardKL(alpha):
            return np_kl(p, alpha * p + (1 - alpha) * q)
        case SkewReverseKL(alpha):
            return np_kl(q, alpha * q + (1 - alpha) * p)
        case AlphaDivergence(alpha):
            return (1 - np_products(p, q, alpha).sum(-1)) / (alpha * (1 - alpha))
        case RenyiDivergence(alpha):
            return np.log(np_products(p, q, alpha).sum(-1)) / (alpha - 1)
        case ClippedForwardKL(limit):
            return np.minimum(np_terms(p, q), limit).sum(-1)
        case EntropyAware(threshold, weight):
            entropy = -np_kl(p, np.ones_like(p))
            return np_kl(q, p) + np.where(entropy >= threshold, weight * np_kl(p, q), 0.0)
        case SampledReverseKL():
            student, teacher = np_at_target(q, is_target), np_at_target(p, is_target)
            if held is None:
                return np.log(student / teacher)
            # -A log q with the advantage A = log p - log q held fixed.
            return np.log(np_at_target(held, is_target) / teacher) * np.log(student)
    raise AssertionError(f"no float64 definition of {divergence}; add a case for its class here")


def np_divergence(
    divergence: Divergence, student, teacher, targets, temperatures=(1.0, 1.0)
) -> np.ndarray:
    """The same of logits."""
    probs = np_softmax(student, temperatures[0])
    return np_value(divergence, probs, *_constants(probs, teacher, targets, temperatures))


def np_gradient(
    divergence: Divergence, student, teacher, targets, temperatures=(1.0, 1.0), step=1e-5
) -> np.ndarray:
    """The gradient in the student's logits, by central differences."""
    probs = np_softmax(student, temperatures[0])
    constants = (*_constants(probs, teacher, targets, temperatures), probs)
    return np_central_differences(
        lambda logits: np_value(divergence, np_softmax(logits, temperatures[0]), *constants),
        student,
        step,
    )


def _constants(probs, teacher, targets, temperatures):
    is_target = targets[..., None] == np.arange(probs.shape[-1])
    return None if teacher is None else np_softmax(teacher, temperatures[1]), is_target


def np_central_differences(function, logits, step):
    """The gradient in each row of logits of a function of rows."""
    logits = np.asarray(logits, np.float64)
    shifts = step * np.eye(logits.shape[-1])
    columns = [(function(logits + s) - function(logits - s)) / (2 * step) for s in shifts]
    return np.stack(columns, axis=-1)
