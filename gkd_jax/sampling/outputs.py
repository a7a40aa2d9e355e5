"""Helpers for sampling and beam search: argument checks, token comparison, repeated rows."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Int, PyTree

Tree = TypeVar("Tree", bound=PyTree)


def check_output_ids(
    vocab_size: int, *, eos_ids: tuple[int, ...], pad_id: int, max_length: int
) -> None:
    """Checks that special ids are in the vocabulary and that the output length is positive.

    Raises:
      ValueError: an id is outside the vocabulary, or `max_length` is below 1.
    """
    for name, ids in (("eos_ids", eos_ids), ("pad_id", (pad_id,))):
        if not all(0 <= number < vocab_size for number in ids):
            raise ValueError(
                f"{name} must lie in the model's vocabulary of {vocab_size} entries; got {ids}. "
                "Take them from the vocabulary that the model was trained with."
            )
    if max_length < 1:
        raise ValueError(
            f"max_length must be at least 1; got {max_length}. Set the target length to the "
            "longest output you want."
        )


def is_any_of(tokens: Int[Array, "*n"], ids: tuple[int, ...]) -> Bool[Array, "*n"]:
    """Returns whether each token is one of `ids`, which may be empty."""
    found = jnp.zeros(tokens.shape, bool)
    for number in ids:
        found |= tokens == number
    return found


def repeat_rows(tree: Tree, count: int) -> Tree:
    """Repeats each row `count` times: [a, b] becomes [a, a, b, b].

    Uses a broadcast and a reshape instead of a gather, so that no data moves between devices if the
    batch is sharded.
    """
    if count == 1:
        return tree

    def repeat(array: Array) -> Array:
        shape = (array.shape[0], count, *array.shape[1:])
        wide = jax.lax.broadcast_in_dim(array, shape, (0, *range(2, len(shape))))
        return wide.reshape(-1, *array.shape[1:])

    return jax.tree.map(repeat, tree)
