"""Positions of a batch that have weight, in chunks of a fixed size.

Chunks have a static shape. A loop runs only over the chunks that contain positions with weight, so
that padding and masked positions cost nothing.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.common.array_types import Array, Bool, Float, Int, PyTree

Rows = TypeVar("Rows", bound=PyTree)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The positions that have weight, in order, in chunks of one size.

    An array over chunks has as many slots as there are positions, rounded up to whole chunks. The
    positions with weight take the first slots, in order; the slots after them are unused.

    Attributes:
      size: number of positions in a chunk.
      mask: True at positions with weight.
      order: index of the position in each slot. In unused slots the index is the number of
        positions, which is out of bounds, so that `take` fills these slots with 0.
    """

    size: int
    mask: Bool[Array, " N"]
    order: Int[Array, " P"]

    @classmethod
    def of(cls, mask: Bool[Array, " N"], size: int) -> "Chunks":
        """Divides the positions where `mask` is True into chunks of `size`."""
        num_slots = -(-len(mask) // size) * size
        (order,) = jnp.nonzero(mask, size=num_slots, fill_value=len(mask))
        return cls(size, mask, order)

    @property
    def num_slots(self) -> int:
        """Length of an array over chunks, unused slots included."""
        return len(self.order)

    @property
    def num_chunks(self) -> Int[Array, ""]:
        """Number of chunks that hold any position."""
        return -(-jnp.sum(self.mask) // self.size)

    def take(self, arrays: Rows, index: Int[Array, ""]) -> Rows:
        """Gathers the positions of one chunk from arrays over all positions."""
        rows = lax.dynamic_slice_in_dim(self.order, index * self.size, self.size)

        def take(x: Array) -> Array:
            picked = jnp.asarray(x).at[rows]
            return picked.get(mode="fill", fill_value=0, indices_are_sorted=True)

        return jax.tree.map(take, arrays)

    def put(
        self, array: Float[Array, "P *d"], values: Float[Array, "C *d"], index: Int[Array, ""]
    ) -> Float[Array, "P *d"]:
        """Writes the values of one chunk to an array over chunks."""
        return lax.dynamic_update_slice_in_dim(array, values, index * self.size, axis=0)

    def restore(self, array: Float[Array, "P *d"]) -> Float[Array, "N *d"]:
        """Converts an array over chunks to an array over positions, 0 where there is no weight."""
        slots = jnp.where(self.mask, jnp.cumsum(self.mask) - 1, self.num_slots)
        return array.at[slots].get(mode="fill", fill_value=0)
