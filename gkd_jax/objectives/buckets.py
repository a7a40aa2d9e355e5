"""Bucketed distributions: a few vocabulary entries, and one bucket for all others, the tail.

A sparse teacher is stored in this form. The student's distribution is put into the same buckets.
The divergence then sums its terms over the E + 1 buckets instead of over the vocabulary. For every
f-divergence, the bucketed divergence is a lower bound of the divergence over the vocabulary. The
two are equal if teacher and student are proportional on the tail.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A bucketed distribution.

    Attributes:
      ids: tokens of the first E buckets; the vocabulary size for an unused bucket.
      rest: log q_v of the tokens in the tail, -inf for all other tokens.
      log_probs: log-probability of each bucket, with the tail last; -inf for an empty bucket.
    """

    ids: Int[Array, "*n E"]
    rest: Float[Array, "*n V"]
    log_probs: Float[Array, "*n E1"]

    @classmethod
    def of(cls, log_probs: Float[Array, "*n V"], ids: Int[Array, "*n E"]) -> "Buckets":
        """Buckets a distribution that is normalised over the whole vocabulary.

        Args:
          log_probs: log q_v.
          ids: tokens with a bucket of their own, all different; -1 for an unused bucket.
        """
        vocab_size = log_probs.shape[-1]
        is_entry = ids >= 0
        # Ids of unused buckets are out of bounds, so that `_put` ignores them.
        ids = jnp.where(is_entry, ids, vocab_size)
        entries = jnp.take_along_axis(log_probs, jnp.where(is_entry, ids, 0), axis=-1)
        entries = jnp.where(is_entry, entries, -jnp.inf)
        rest = _put(log_probs, ids, jnp.full(ids.shape, -jnp.inf, entries.dtype))
        # The tail is summed directly, because log(1 - sum of the entries) would have no correct
        # digits if the sum is near 1.
        tail = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
        return cls(ids, rest, jnp.concatenate([entries, tail], axis=-1))

    def holds(self, tokens: Int[Array, "*n"]) -> Bool[Array, "*n E1"]:
        """Returns a mask that is True at the bucket of each token."""
        is_own = self.ids == tokens[..., None]
        in_tail = ~jnp.any(is_own, axis=-1, keepdims=True)
        return jnp.concatenate([is_own, in_tail], axis=-1)

    def spread(self, slope: Float[Array, "*n E1"]) -> Float[Array, "*n V"]:
        """Converts slopes in buckets' log-probabilities to slopes in tokens' log-probabilities.

        Each token of the tail gets a share of the tail's slope,

            d log q_tail / d log q_v = q_v / q_tail.
        """
        tail = self.log_probs[..., -1:]
        # If the tail is empty, all shares must be 0, but -inf minus -inf would be NaN.
        share = jnp.exp(self.rest - jnp.where(jnp.isneginf(tail), 0.0, tail))
        tail_slope = jnp.where(share > 0, share * slope[..., -1:], 0.0)
        return _put(tail_slope, self.ids, slope[..., :-1])


def _put(values: Array, ids: Array, new: Array) -> Array:
    """Replaces values at some indices of the last axis; ignores indices out of bounds."""
    return jnp.put_along_axis(values, ids, new, axis=-1, inplace=False, mode="drop")
