"""Choosing one token a row from logits: greedy, temperature, top-k and top-p.

A draw costs a uniform a level of a tree over the vocabulary (three for up to 65,536 entries)
instead of a random number an entry: each level picks one of 32 groups by its probability, the
last level the entry. Uniforms are dense near 0 and cumulative sums run from small to large, so
that an entry of any probability that float32 can hold is drawn at its own rate, and one of
probability 0 never.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.array_types import Array, Bool, Float, Int, Key

FANOUT = 32
"""Groups a level; its square is the work of a level, in comparisons a row."""


class SamplingMethod(Protocol):
    """Chooses the next token of every row."""

    @property
    def needs_key(self) -> bool:
        """Whether `choose` draws random numbers."""
        ...

    def choose(
        self, logits: Float[Array, "B V"], *, keys: Key[Array, " B"] | None
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """Returns tokens (int32) and their log-probabilities (float32)."""
        ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the likeliest token; of equal ones the lowest id.

    Its log-probabilities are the model's own, at temperature 1.
    """

    @property
    def needs_key(self) -> bool:
        """A greedy choice draws nothing."""
        return False

    def choose(
        self, logits: Float[Array, "B V"], *, keys: Key[Array, " B"] | None = None
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """Returns the argmax of each row and its log-probability; `keys` is not used."""
        del keys
        # A maximum and a minimum reduce many lanes at once; XLA's argmax on a CPU does not.
        is_best = logits == jnp.max(logits, axis=-1, keepdims=True)
        ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        tokens = jnp.min(jnp.where(is_best, ids, logits.shape[-1] - 1), axis=-1)
        return tokens, _at(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws from softmax(logits / temperature), optionally cut to its most likely part.

    Nothing is cut unless asked for. With both cuts, top-k comes first and top-p is a share of
    what it left. Of equal logits at a border the lower ids are kept.

    Log-probabilities are those of softmax(logits / temperature) over the whole vocabulary,
    **before** top-k and top-p: they stay finite and comparable with a teacher's, and equal
    what scoring the tokens at that temperature gives.

    Attributes:
      temperature: divides the logits; 1 is the model's own distribution.
      top_k: keep exactly this many of the likeliest entries; None keeps all.
      top_p: keep the smallest set of likeliest entries whose probability reaches this.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"Sample.temperature must be above 0; got {self.temperature}. For the limit of "
                "temperature 0 use Greedy()."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"Sample.top_k must be at least 1; got {self.top_k}. Leave it None to keep the "
                "whole vocabulary."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"Sample.top_p must be above 0 and at most 1; got {self.top_p}. Leave it None to "
                "keep the whole vocabulary."
            )

    @property
    def needs_key(self) -> bool:
        """Every draw needs a key."""
        return True

    def choose(
        self, logits: Float[Array, "B V"], *, keys: Key[Array, " B"] | None
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """Draws one token a row.

        Args:
          logits: float32; -inf is an entry that can never be drawn.
          keys: one key a row, used for nothing else.

        Returns:
          Tokens (int32) and their log-probabilities at the sampling temperature (float32).
        """
        if keys is None:
            raise ValueError("Sample needs random keys; got None. Give one key a row.")
        scaled = logits / self.temperature
        uniforms = _dense_uniforms(keys, count=_num_levels(logits.shape[-1]))
        kept = _truncate(scaled, top_k=self.top_k, top_p=self.top_p)
        tokens, log_normaliser = _draw(kept, uniforms)
        if kept is not scaled:
            log_normaliser = jax.nn.logsumexp(scaled, axis=-1)
        return tokens, _at(scaled, tokens) - log_normaliser


def row_keys(
    key: Key[Array, ""], *, example_id: Int[Array, " B"], sample_index: Int[Array, " B"]
) -> Key[Array, " B"]:
    """Returns the key of each output: `key` folded with its example and its sample number.

    A row's place in the batch is not in it, so the same example gets the same sample in
    whatever batch, shard or host it lands.
    """
    fold = jax.vmap(jax.random.fold_in)
    per_example = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, example_id)
    return fold(per_example, sample_index)


def position_keys(keys: Key[Array, " B"], position: Int[Array, ""]) -> Key[Array, " B"]:
    """Returns the keys of one output position."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)


def _at(values: Float[Array, "B n"], index: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]


def _dense_uniforms(keys: Key[Array, " B"], *, count: int) -> Float[Array, "B n"]:
    """Uniforms in [0, 1] with 24 significant bits however small they are.

    `jax.random.uniform` has multiples of 2**-23 only, which would make every event of a
    smaller probability impossible or too frequent.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, (count, 2), jnp.uint32))(keys)
    high, low = bits[..., 0].astype(jnp.float32), bits[..., 1].astype(jnp.float32)
    return high * 2.0**-32 + low * 2.0**-64


def _num_levels(size: int) -> int:
    """Uniforms that a draw from `size` entries takes."""
    return 1 if size <= 2 * FANOUT else 1 + _num_levels(-(-size // FANOUT))


def _columns(values: Float[Array, "B n"], *, fill: float) -> Float[Array, "B F m"]:
    """Groups of FANOUT entries that lie m apart, so that sums over a group run along lanes."""
    padding = -values.shape[1] % FANOUT
    if padding:
        values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=fill)
    return values.reshape(values.shape[0], FANOUT, -1)


def _column(columns: Float[Array, "B F m"], index: Int[Array, " B"]) -> Float[Array, "B F"]:
    return jnp.take_along_axis(columns, index[:, None, None], axis=2)[:, :, 0]


def _draw(
    scaled: Float[Array, "B V"], uniforms: Float[Array, "B n"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws from softmax(scaled); also returns logsumexp(scaled), which falls out."""
    maximum = jnp.max(scaled, axis=-1, keepdims=True)
    if uniforms.shape[1] == 1:
        masses = jnp.exp(scaled - maximum)
        tokens = _pick(masses, uniforms[:, 0])
    else:
        columns = _columns(scaled, fill=-jnp.inf)
        masses = jnp.exp(columns - maximum[:, :, None]).sum(axis=1)
        place = _pick_in_tree(masses, uniforms[:, 1:])
        # The group's own maximum: entries far below the likeliest keep their precision.
        group = _column(columns, place)
        group = jnp.exp(group - jnp.max(group, axis=-1, keepdims=True))
        tokens = _pick(group, uniforms[:, 0]) * columns.shape[2] + place
    return tokens, maximum[:, 0] + jnp.log(jnp.sum(masses, axis=-1))


def _pick_in_tree(
    masses: Float[Array, "B n"], uniforms: Float[Array, "B levels"]
) -> Int[Array, " B"]:
    """Draws index i with probability masses[i] / sum(masses), one uniform a level."""
    if uniforms.shape[1] == 1:
        return _pick(masses, uniforms[:, 0])
    columns = _columns(masses, fill=0.0)
    place = _pick_in_tree(columns.sum(axis=1), uniforms[:, 1:])
    return _pick(_column(columns, place), uniforms[:, 0]) * columns.shape[2] + place


def _pick(masses: Float[Array, "B n"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Draws index i with probability masses[i] / sum(masses), for few masses.

    Inverts the cumulative sum from the smallest mass to the largest, in which small ones are not
    lost to rounding against large ones before them. For a few dozen entries comparing all
    pairs is faster than sorting.
    """
    shape = (masses.shape[0], masses.shape[1], masses.shape[1])
    this, other = masses[:, :, None], masses[:, None, :]
    order = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 2)
    up_to_this = (other < this) | ((other == this) & (order >= 0))
    cumulative = jnp.sum(jnp.where(up_to_this, other, 0.0), axis=-1)
    # Below the total even where the uniform rounded up to 1. The sum at an entry of mass 0 is
    # exactly 0, which is never above the threshold.
    uniform = jnp.minimum(uniform, 1 - 2.0**-24)[:, None]
    above = cumulative > uniform * jnp.max(cumulative, axis=-1, keepdims=True)
    return jnp.argmin(jnp.where(above, cumulative, jnp.inf), axis=-1).astype(jnp.int32)


def _truncate(
    scaled: Float[Array, "B V"], *, top_k: int | None, top_p: float | None
) -> Float[Array, "B V"]:
    """Sets all but the top-k, then all but the top-p entries to -inf."""
    if top_k is not None and top_k < scaled.shape[-1]:
        target = jnp.full((scaled.shape[0], 1), top_k, jnp.float32)
        kept = _smallest_top_set(scaled, jnp.ones_like(scaled), target)
        scaled = jnp.where(kept, scaled, -jnp.inf)
    if top_p is not None and top_p < 1:
        masses = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
        target = top_p * jnp.sum(masses, axis=-1, keepdims=True)
        scaled = jnp.where(_smallest_top_set(scaled, masses, target), scaled, -jnp.inf)
    return scaled


def _smallest_top_set(
    values: Float[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, "B 1"]
) -> Bool[Array, "B V"]:
    """Finds the fewest largest values whose weights sum to the target; lower ids first.

    Instead of a sort, finds the smallest value that belongs to the set bit by bit, then among
    the entries equal to it the last id: one sum over the vocabulary a bit.
    """
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    # Unsigned integers in the order of the floats.
    sign = jnp.uint32(1 << 31)
    ranks = jnp.where(bits >= sign, ~bits, bits | sign)
    ids = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    num_id_bits = values.shape[-1].bit_length()

    def total(kept: Bool[Array, "B V"]) -> Float[Array, "B 1"]:
        return jnp.sum(jnp.where(kept, weights, 0.0), axis=-1, keepdims=True)

    def lower_threshold(i: Array, threshold: Array) -> Array:
        trial = threshold | lax.shift_right_logical(sign, i.astype(jnp.uint32))
        return jnp.where(total(ranks >= trial) >= target, trial, threshold)

    zeros = jnp.zeros_like(ranks, shape=(values.shape[0], 1))
    threshold = lax.fori_loop(0, 32, lower_threshold, zeros)
    above, equal = ranks > threshold, ranks == threshold

    def raise_last_id(i: Array, last: Array) -> Array:
        trial = last | lax.shift_right_logical(jnp.int32(1 << (num_id_bits - 1)), i)
        return jnp.where(total(above | (equal & (ids < trial))) < target, trial, last)

    last_id = lax.fori_loop(0, num_id_bits, raise_last_id, zeros.astype(jnp.int32))
    return above | (equal & (ids <= last_id))
