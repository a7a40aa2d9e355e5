"""Fits a single bump to a teacher with two, under each divergence: mode covering, mode seeking.

    python examples/toy_divergences.py docs/objectives.png

The vocabulary is a line of 100 entries. The student can only represent a single bump, as a small
model cannot represent all of its teacher's distribution; the divergence decides what it fits.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gkd_jax.common.array_types import Array
from gkd_jax.objectives import (
    AlphaDivergence,
    ClippedForwardKL,
    Divergence,
    EntropyAware,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    token_divergence,
)

LINE = jnp.linspace(-5.0, 5.0, 100)
DIVERGENCES: dict[str, Divergence] = {
    "forward KL": ForwardKL(),
    "skew forward KL (0.1)": SkewForwardKL(0.1),
    "JSD(0.1)": GeneralizedJSD(0.1),
    "clipped forward KL (0.05)": ClippedForwardKL(0.05),
    "alpha divergence (0.5)": AlphaDivergence(0.5),
    "JSD(0.5)": GeneralizedJSD(0.5),
    "entropy-aware (3 nats)": EntropyAware(3.0),
    "total variation": TotalVariation(),
    "JSD(0.9)": GeneralizedJSD(0.9),
    "skew reverse KL (0.1)": SkewReverseKL(0.1),
    "reverse KL": ReverseKL(),
}


def bump(mean: Array | float, log_width: Array | float) -> Array:
    """Returns the logits of a normal distribution over the line."""
    return -0.5 * jnp.square((LINE - mean) / jnp.exp(log_width))


TEACHER = jnp.logaddexp(
    jnp.log(0.6) + jax.nn.log_softmax(bump(-2.5, jnp.log(0.35))),
    jnp.log(0.4) + jax.nn.log_softmax(bump(2.5, jnp.log(0.6))),
)


# Starting points, as mean and logarithm of the width: at either mode, and over both.
STARTS = (jnp.array([-2.0, 2.0, 0.0]), jnp.array([-0.5, -0.5, 1.0]))


def fit(divergence: Divergence, *, num_steps: int = 3000) -> Array:
    """Returns the probabilities of the best student among those trained from `STARTS`."""
    optimizer = optax.adam(0.01)

    def loss(parameters: tuple[Array, Array]) -> Array:
        logits = bump(*parameters)[None]
        return token_divergence(divergence, logits, TEACHER[None], jnp.zeros(1, jnp.int32))[0]

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        parameters, state = carry
        updates, state = optimizer.update(jax.grad(loss)(parameters), state)
        return (optax.apply_updates(parameters, updates), state), None

    @jax.jit
    @jax.vmap
    def train(parameters: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        carry = (parameters, optimizer.init(parameters))
        (parameters, _), _ = jax.lax.scan(step, carry, length=num_steps)
        return loss(parameters), parameters

    losses, found = train(STARTS)
    best = jnp.argmin(losses)
    return jax.nn.softmax(bump(found[0][best], found[1][best]))


def main(path: str) -> None:
    """Prints mean and width of each student, and plots all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    teacher = jnp.exp(TEACHER)
    figure, axes = plt.subplots(3, 4, figsize=(12, 6.5), sharex=True, sharey=True)
    for axis, (name, divergence) in zip(axes.flat, DIVERGENCES.items(), strict=False):
        student = fit(divergence)
        mean = float(student @ LINE)
        width = float(jnp.sqrt(student @ jnp.square(LINE - mean)))
        print(f"{name:26} mean {mean:5.2f}, standard deviation {width:4.2f}")
        axis.fill_between(LINE, np.asarray(teacher), color="0.85")
        axis.plot(LINE, student)
        axis.set_title(name, fontsize=10)
        axis.set_yticks([])
    axes.flat[-1].axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
