"""Choosing one token a row from logits: greedy, temperature, top-k and top-p.

A draw costs a uniform a level of a tree over the vocabulary (three for up to 65,536 entries)
instead of a random number an entry: each level picks one of 32 groups by its probability, the
last level the entry. Uniforms are dense near 0 and cumulative sums run from small to large, so
that an entry of any probability that float32 can hold is drawn at its own rate, and one of
probability 0 never. Neither cut sorts the vocabulary: see `_keep_top_k` and `_draw_top_p`.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key

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
        scaled = kept = logits / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            kept = _keep_top_k(scaled, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            tokens, log_normaliser = _draw_top_p(kept, keys, self.top_p)
        else:
            tokens, log_normaliser = _draw(kept, _uniforms_of_draw(keys, kept))
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


def _uniforms_of_draw(keys: Key[Array, " B"], values: Float[Array, "B V"]) -> Float[Array, "B n"]:
    return _dense_uniforms(keys, count=_num_levels(values.shape[-1]))


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


def _keep_top_k(values: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Sets all but the k largest values to -inf; of equal ones the lower ids are kept.

    The k largest lie in the k groups of the largest maxima (or are equal to others that do), so
    that what is ranked are the groups and then the entries of a few of them.
    """
    candidates = values
    if k * FANOUT <= values.shape[-1] // 4:
        columns = _columns(values, fill=-jnp.inf)
        _, groups = lax.top_k(jnp.max(columns, axis=1), k)
        candidates = jnp.take_along_axis(columns, groups[:, None, :], axis=2)
        candidates = candidates.reshape(values.shape[0], -1)
    # Not the last one: XLA would take that for a reason to sort.
    threshold = jnp.min(lax.top_k(candidates, k)[0], axis=-1, keepdims=True)
    kept = values >= threshold

    def without_higher_ids() -> Bool[Array, "B V"]:
        above, equal = values > threshold, values == threshold
        room = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
        return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))

    num_kept = jnp.sum(jnp.where(kept, 1.0, 0.0), axis=-1)
    kept = lax.cond(jnp.any(num_kept > k), without_higher_ids, lambda: kept)
    return jnp.where(kept, values, -jnp.inf)


def _draw_top_p(
    scaled: Float[Array, "B V"], keys: Key[Array, " B"], top_p: float
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws from the fewest likeliest entries whose probabilities sum to `top_p`.

    Draws from all, and again while the token is not among those: it is where the entries before
    it (the likelier ones, and equal ones of lower ids) have less than `top_p`. What was refused
    ends the entries that are still drawn from. As all that is kept comes before it, this changes
    no ratio between what is kept, and a row takes 1 + log(1 / top_p) draws on average or fewer.

    Returns:
      Tokens, and logsumexp(scaled) of all entries.
    """
    tokens, log_normaliser = _draw(scaled, _uniforms_of_draw(keys, scaled))
    probs = jnp.exp(scaled - log_normaliser[:, None])
    ids = lax.broadcasted_iota(jnp.int32, scaled.shape, 1)

    def come_before(tokens: Int[Array, " B"]) -> Bool[Array, "B V"]:
        values = _at(scaled, tokens)[:, None]
        return (scaled > values) | ((scaled == values) & (ids < tokens[:, None]))

    def is_kept(tokens: Int[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.sum(jnp.where(come_before(tokens), probs, 0.0), axis=-1) < top_p

    def draw_again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        draws, tokens, kept = carry
        new_keys = position_keys(keys, draws)
        left = jnp.where(come_before(tokens), scaled, -jnp.inf)
        # A row that is done may have nothing left, and its draw is not used.
        left = jnp.where(kept[:, None], scaled, left)
        again, _ = _draw(left, _uniforms_of_draw(new_keys, scaled))
        tokens = jnp.where(kept, tokens, again)
        return draws + 1, tokens, is_kept(tokens) | is_broken

    # A row with NaN has no such entries, and must not be drawn from for ever.
    is_broken = ~jnp.isfinite(log_normaliser)
    carry = (jnp.ones((), jnp.int32), tokens, is_kept(tokens) | is_broken)
    _, tokens, _ = lax.while_loop(lambda carry: ~jnp.all(carry[2]), draw_again, carry)
    return tokens, log_normaliser
