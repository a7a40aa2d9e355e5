"""Methods that choose the next token of each row: greedy, temperature, top-k and top-p.

Sampling descends a tree over the vocabulary: each level selects one of 32 groups by its
probability, and the last level selects the entry. Each level takes one uniform random number, so a
row of 65,536 entries takes three, while Gumbel noise would take one per entry. Any probability that
float32 can represent is sampled at the correct rate, because the uniforms are dense near 0 and
cumulative sums run from small to large terms. Entries of probability 0 are never sampled. Neither
top-k nor top-p sorts the vocabulary: see `_keep_top_k` and `_draw_top_p`.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key

FANOUT = 32
"""Number of groups per level. Each level takes FANOUT ** 2 comparisons per row."""


class SamplingMethod(Protocol):
    """Chooses the next token of each row."""

    @property
    def needs_key(self) -> bool:
        """Whether `choose` needs random keys."""
        ...

    def choose(
        self, logits: Float[Array, "B V"], *, keys: Key[Array, " B"] | None
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """Returns tokens (int32) and their log-probabilities (float32)."""
        ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Chooses the most likely token. Among equally likely tokens, the lowest id is chosen.

    Log-probabilities are taken from the model's distribution at temperature 1.
    """

    @property
    def needs_key(self) -> bool:
        return False

    def choose(
        self, logits: Float[Array, "B V"], *, keys: Key[Array, " B"] | None = None
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """Returns the argmax of each row and its log-probability; `keys` is not used."""
        del keys
        # On CPU, XLA vectorises maximum and minimum reductions, but not argmax.
        is_best = logits == jnp.max(logits, axis=-1, keepdims=True)
        ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        tokens = jnp.min(jnp.where(is_best, ids, logits.shape[-1] - 1), axis=-1)
        return tokens, _at(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Samples from softmax(logits / temperature), optionally restricted by top-k and top-p.

    By default the distribution is not restricted. If both restrictions are set, top-k applies
    first, and `top_p` is relative to the total probability of the entries that top-k keeps. Among
    equal logits at the threshold, lower ids are kept.

    Log-probabilities are taken from softmax(logits / temperature) over the entire vocabulary,
    **before** top-k and top-p. They are therefore finite and comparable with the teacher's
    log-probabilities. A forward pass over the finished output at this temperature gives the same
    values.

    Attributes:
      temperature: divisor of the logits; 1 samples from the model's own distribution.
      top_k: keeps exactly this many of the most likely entries; None keeps all.
      top_p: keeps the smallest set of most likely entries whose total probability reaches this
        value; None keeps all.
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
        return True

    def choose(
        self, logits: Float[Array, "B V"], *, keys: Key[Array, " B"] | None
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """Samples one token per row.

        Args:
          logits: float32; entries with -inf are never sampled.
          keys: one random key per row. They must not be used elsewhere.

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
    """Returns the key of each output, derived from its example id and its sample index.

    A key does not depend on the position of its row in the batch. The samples of an example are
    therefore the same in any batch, on any shard and on any host.
    """
    fold = jax.vmap(jax.random.fold_in)
    per_example = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, example_id)
    return fold(per_example, sample_index)


def position_keys(keys: Key[Array, " B"], position: Int[Array, ""]) -> Key[Array, " B"]:
    """Returns the keys of the rows at one output position."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)


def _at(values: Float[Array, "B n"], index: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]


def _dense_uniforms(keys: Key[Array, " B"], *, count: int) -> Float[Array, "B n"]:
    """Returns uniforms in [0, 1] with 24 significant bits, even if they are close to 0.

    `jax.random.uniform` returns multiples of 2**-23. With these, events of a probability below
    2**-23 would never occur, or occur too often.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, (count, 2), jnp.uint32))(keys)
    high, low = bits[..., 0].astype(jnp.float32), bits[..., 1].astype(jnp.float32)
    return high * 2.0**-32 + low * 2.0**-64


def _num_levels(size: int) -> int:
    """Returns the number of uniforms needed to sample from `size` entries."""
    return 1 if size <= 2 * FANOUT else 1 + _num_levels(-(-size // FANOUT))


def _uniforms_of_draw(keys: Key[Array, " B"], values: Float[Array, "B V"]) -> Float[Array, "B n"]:
    return _dense_uniforms(keys, count=_num_levels(values.shape[-1]))


def _columns(values: Float[Array, "B n"], *, fill: float) -> Float[Array, "B F m"]:
    """Pads rows with `fill` and splits them into m groups of FANOUT entries.

    Successive entries of a group are m apart in the row, so that sums over groups vectorise.
    """
    padding = -values.shape[1] % FANOUT
    if padding:
        values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=fill)
    return values.reshape(values.shape[0], FANOUT, -1)


def _column(columns: Float[Array, "B F m"], index: Int[Array, " B"]) -> Float[Array, "B F"]:
    return jnp.take_along_axis(columns, index[:, None, None], axis=2)[:, :, 0]


def _draw(
    scaled: Float[Array, "B V"], uniforms: Float[Array, "B n"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Samples from softmax(scaled). Returns the indices and logsumexp(scaled)."""
    maximum = jnp.max(scaled, axis=-1, keepdims=True)
    if uniforms.shape[1] == 1:
        masses = jnp.exp(scaled - maximum)
        tokens = _pick(masses, uniforms[:, 0])
    else:
        columns = _columns(scaled, fill=-jnp.inf)
        masses = jnp.exp(columns - maximum[:, :, None]).sum(axis=1)
        index = _pick_in_tree(masses, uniforms[:, 1:])
        # The maximum of the group itself is subtracted. With the maximum of the row, groups far
        # below the maximum would underflow.
        group = _column(columns, index)
        group = jnp.exp(group - jnp.max(group, axis=-1, keepdims=True))
        tokens = _pick(group, uniforms[:, 0]) * columns.shape[2] + index
    return tokens, maximum[:, 0] + jnp.log(jnp.sum(masses, axis=-1))


def _pick_in_tree(
    masses: Float[Array, "B n"], uniforms: Float[Array, "B levels"]
) -> Int[Array, " B"]:
    """Samples index i with probability masses[i] / sum(masses), with one uniform per level."""
    if uniforms.shape[1] == 1:
        return _pick(masses, uniforms[:, 0])
    columns = _columns(masses, fill=0.0)
    index = _pick_in_tree(columns.sum(axis=1), uniforms[:, 1:])
    return _pick(_column(columns, index), uniforms[:, 0]) * columns.shape[2] + index


def _pick(masses: Float[Array, "B n"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Samples index i with probability masses[i] / sum(masses), for a few dozen masses.

    Inverts a cumulative sum that runs from the smallest to the largest mass. In this order, small
    masses are not lost to rounding. For a few dozen masses, comparing all pairs is faster than
    sorting.
    """
    shape = (masses.shape[0], masses.shape[1], masses.shape[1])
    this, other = masses[:, :, None], masses[:, None, :]
    order = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 2)
    up_to_this = (other < this) | ((other == this) & (order >= 0))
    cumulative = jnp.sum(jnp.where(up_to_this, other, 0.0), axis=-1)
    # A uniform that was rounded up to 1 is reduced, so that the threshold is below the total. At
    # entries of mass 0 the cumulative sum is exactly 0, which is never above the threshold.
    uniform = jnp.minimum(uniform, 1 - 2.0**-24)[:, None]
    above = cumulative > uniform * jnp.max(cumulative, axis=-1, keepdims=True)
    return jnp.argmin(jnp.where(above, cumulative, jnp.inf), axis=-1).astype(jnp.int32)


def _keep_top_k(values: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Sets all but the k largest values to -inf. Among equal values, those with lower ids are kept.

    Rows are divided into groups. The k groups with the largest maxima contain the k largest values,
    or values equal to these. Therefore only the maxima of all groups and the entries of k groups
    are ranked.
    """
    candidates = values
    if k * FANOUT <= values.shape[-1] // 4:
        columns = _columns(values, fill=-jnp.inf)
        _, groups = lax.top_k(jnp.max(columns, axis=1), k)
        candidates = jnp.take_along_axis(columns, groups[:, None, :], axis=2)
        candidates = candidates.reshape(values.shape[0], -1)
    # The threshold is computed as a minimum. If the last element were taken instead, XLA would sort
    # all values.
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
    """Samples from the smallest set of most likely entries whose total probability reaches `top_p`.

    Entries are ranked by probability, and equally likely entries by ascending id. Rejection
    sampling accepts a token if the total probability of the entries ranked before it is below
    `top_p`. After a rejection, only the entries ranked before the rejected token remain for the
    next draw. They include all acceptable entries, so the ratios between the probabilities of
    acceptable entries do not change. A row takes at most 1 + log(1 / top_p) draws on average.

    Returns:
      Tokens, and logsumexp(scaled) over all entries.
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
        remaining = jnp.where(come_before(tokens), scaled, -jnp.inf)
        # In rows with an accepted token, there may be no remaining entries. These rows draw from
        # all entries, and the result of this draw is not used.
        remaining = jnp.where(kept[:, None], scaled, remaining)
        again, _ = _draw(remaining, _uniforms_of_draw(new_keys, scaled))
        tokens = jnp.where(kept, tokens, again)
        return draws + 1, tokens, is_kept(tokens) | is_broken

    # Rows with NaNs have no acceptable entry and would otherwise loop forever.
    is_broken = ~jnp.isfinite(log_normaliser)
    carry = (jnp.ones((), jnp.int32), tokens, is_kept(tokens) | is_broken)
    _, tokens, _ = lax.while_loop(lambda carry: ~jnp.all(carry[2]), draw_again, carry)
    return tokens, log_normaliser
