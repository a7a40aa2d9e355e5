"""What several tests of objectives share: one of every divergence, float64 definitions, cases."""

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


def np_at_target(probs, targets):
    return np.take_along_axis(probs, targets[..., None], -1)[..., 0]


def np_divergence(
    divergence: Divergence, student, teacher, targets, temperatures=(1.0, 1.0)
) -> np.ndarray:
    """Textbook definitions in float64, of logits."""
    if isinstance(divergence, WeightedSum):
        return sum(
            weight * np_divergence(one, student, teacher, targets, temperatures)
            for one, weight in zip(divergence.divergences, divergence.weights, strict=True)
        )
    q = np_softmax(student, temperatures[0])
    if isinstance(divergence, NegativeLogLikelihood):
        return -np.log(np_at_target(q, targets))
    p = np_softmax(teacher, temperatures[1])
    match divergence:
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
            return (1 - (p**alpha * q ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))
        case RenyiDivergence(alpha):
            with np.errstate(divide="ignore", invalid="ignore"):
                products = np.where(p > 0, p**alpha * q ** (1 - alpha), 0.0)
                return np.log(products.sum(-1)) / (alpha - 1)
        case ClippedForwardKL(limit):
            return np.minimum(np_terms(p, q), limit).sum(-1)
        case EntropyAware(threshold, weight):
            entropy = -np_kl(p, np.ones_like(p))
            return np_kl(q, p) + np.where(entropy >= threshold, weight * np_kl(p, q), 0.0)
        case SampledReverseKL():
            return np.log(np_at_target(q, targets) / np_at_target(p, targets))
    raise AssertionError(divergence)


def np_gradient(
    divergence: Divergence, student, teacher, targets, temperatures=(1.0, 1.0), step=1e-5
) -> np.ndarray:
    """The gradient in the student's logits: of a value by central differences."""
    arguments = (teacher, targets, temperatures)
    if isinstance(divergence, WeightedSum):
        return sum(
            weight * np_gradient(one, student, *arguments, step)
            for one, weight in zip(divergence.divergences, divergence.weights, strict=True)
        )
    student = np.asarray(student, np.float64)
    if isinstance(divergence, SampledReverseKL):
        # No derivative of its value: the advantage is held fixed.
        advantage = -np_divergence(divergence, student, *arguments)
        score = np.eye(student.shape[-1])[targets] - np_softmax(student, temperatures[0])
        return -advantage[..., None] * score / temperatures[0]
    gradient = np.zeros_like(student)
    for v in range(student.shape[-1]):
        shift = np.zeros(student.shape[-1])
        shift[v] = step
        above = np_divergence(divergence, student + shift, *arguments)
        below = np_divergence(divergence, student - shift, *arguments)
        gradient[..., v] = (above - below) / (2 * step)
    return gradient
