"""Random keys of a run, derived from the run's seed, with different keys for each purpose."""

import enum

import jax

from gkd_jax.common.array_types import Array, Key


class Purpose(enum.IntEnum):
    """Purpose of a random key.

    The keys of existing runs depend on these numbers: never change or reuse a number.
    """

    INIT = 0
    DROPOUT = 1
    ROLLOUT = 2
    EVALUATION = 3
    GENERATION = 4
    EVALUATION_SAMPLES = 5
    EXAMPLE_COIN = 6
    STORED_DRAWS = 7


def make_key(seed: int, purpose: Purpose, step: int = 0) -> Key[Array, ""]:
    """Derives the key of one purpose at one step from the run's seed."""
    key = jax.random.fold_in(jax.random.key(seed), int(purpose))
    return jax.random.fold_in(key, step)
