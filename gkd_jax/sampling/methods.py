"""Choosing one token a row from logits: greedy, temperature, top-k and top-p.

A draw costs four random words a row instead of one a vocabulary entry: the inverse of the
cumulative distribution in two levels, with one uniform that picks a block of the vocabulary
and an independent one that picks the entry inside it.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.array_types import Array, Float, Int, Key

# Two vector registers of a TPU wide; about sqrt(V) for vocabularies of 32,000 to 256,000.
BLOCK_SIZE = 256


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
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, token_log_probs(logits, tokens)


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
        uniforms = _dense_uniforms(keys, count=2)
        if self.top_k is None and self.top_p in (None, 1.0):
            tokens = _draw(scaled, uniforms)
        else:
            tokens = _draw_truncated(scaled, uniforms[:, 0], top_k=self.top_k, top_p=self.top_p)
        return tokens, token_log_probs(scaled, tokens)


def token_log_probs(logits: Float[Array, "*n V"], tokens: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns log softmax(logits) at `tokens`, without making it for the whole vocabulary."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


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


def _dense_uniforms(keys: Key[Array, " B"], *, count: int) -> Float[Array, "B n"]:
    """Uniforms in [0, 1] with 24 significant bits however small they are.

    `jax.random.uniform` has multiples of 2**-23 only, which would make every event of a
    smaller probability impossible or too frequent.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, (count, 2), jnp.uint32))(keys)
    high, low = bits[..., 0].astype(jnp.float32), bits[..., 1].astype(jnp.float32)
    return high * 2.0**-32 + low * 2.0**-64


def _draw(scaled: Float[Array, "B V"], uniforms: Float[Array, "B 2"]) -> Int[Array, " B"]:
    """Draws from softmax(scaled): first a block of the vocabulary, then an entry of it."""
    batch_size, vocab_size = scaled.shape
    padding = -vocab_size % BLOCK_SIZE
    if padding:
        scaled = jnp.pad(scaled, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    blocks = scaled.reshape(batch_size, -1, BLOCK_SIZE)
    maximum = jnp.max(blocks, axis=(1, 2), keepdims=True)
    block = _pick(jnp.exp(blocks - maximum).sum(axis=-1), uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    # The block's own maximum: a block far below the likeliest one keeps its full precision.
    inside = jnp.exp(inside - jnp.max(inside, axis=-1, keepdims=True))
    return block * BLOCK_SIZE + _pick(inside, uniforms[:, 1])


def _draw_truncated(
    scaled: Float[Array, "B V"],
    uniform: Float[Array, " B"],
    *,
    top_k: int | None,
    top_p: float | None,
) -> Int[Array, " B"]:
    """Draws from the top-k, then top-p part of softmax(scaled)."""
    vocab_size = scaled.shape[-1]
    # lax.top_k puts the lower of two equal entries first, which settles ties at both borders.
    values, ids = lax.top_k(scaled, min(top_k or vocab_size, vocab_size))
    masses = jnp.exp(values - values[:, :1])
    if top_p is not None and top_p < 1:
        cumulative = jnp.cumsum(masses, axis=-1)
        before = jnp.pad(cumulative[:, :-1], ((0, 0), (1, 0)))
        masses = jnp.where(before < top_p * cumulative[:, -1:], masses, 0.0)
    position = _pick_ascending(jnp.flip(masses, axis=-1), uniform)
    position = masses.shape[-1] - 1 - position
    return jnp.take_along_axis(ids, position[:, None], axis=-1)[:, 0]


def _pick(masses: Float[Array, "B n"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Draws index i with probability masses[i] / sum(masses).

    The cumulative sum runs from the smallest mass to the largest, so that small ones are not
    lost to rounding against large ones before them.
    """
    indices = lax.broadcasted_iota(jnp.int32, masses.shape, 1)
    masses, indices = lax.sort((masses, indices), dimension=1, num_keys=1)
    position = _pick_ascending(masses, uniform)
    return jnp.take_along_axis(indices, position[:, None], axis=-1)[:, 0]


def _pick_ascending(masses: Float[Array, "B n"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Inverts the cumulative sum of ascending masses.

    An entry of mass 0 has a cumulative sum of exactly 0 and is passed over even by a uniform of
    0; the last entry, which a uniform that rounded up to 1 takes, has the largest mass.
    """
    cumulative = jnp.cumsum(masses, axis=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    position = jnp.sum(cumulative <= threshold, axis=-1, dtype=jnp.int32)
    return jnp.minimum(position, masses.shape[-1] - 1)
