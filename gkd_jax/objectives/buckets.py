"""A few entries of the vocabulary, and all others as one more: the tail.

A sparse teacher is known at those only. The divergence of teacher and student, both so bucketed,
is a sum over E + 1 entries by the same terms as one over the vocabulary. It is a lower bound of
that one for every f-divergence, and equal to it where teacher and student are proportional on the
tail.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A distribution in buckets.

    Attributes:
      ids: the tokens of the first E buckets, the vocabulary's size where there is none.
      rest: log q_v of the tokens of the tail, -inf on the others.
      log_probs: log of the probability of each bucket, the tail's at the end; -inf for an empty
        one.
    """

    ids: Int[Array, "*n E"]
    rest: Float[Array, "*n V"]
    log_probs: Float[Array, "*n E1"]

    @classmethod
    def of(cls, log_probs: Float[Array, "*n V"], ids: Int[Array, "*n E"]) -> "Buckets":
        """Sums probabilities that are normalised over the whole vocabulary.

        Args:
          log_probs: log q_v.
          ids: different tokens; -1 for a place that holds none.
        """
        vocab_size = log_probs.shape[-1]
        is_entry = ids >= 0
        # Out of bounds: nothing is written there.
        ids = jnp.where(is_entry, ids, vocab_size)
        of_entries = jnp.take_along_axis(log_probs, jnp.where(is_entry, ids, 0), axis=-1)
        of_entries = jnp.where(is_entry, of_entries, -jnp.inf)
        rest = _put(log_probs, ids, jnp.full(ids.shape, -jnp.inf, of_entries.dtype))
        # Not log(1 - sum of the entries): where these are nearly all, no digit would be left.
        tail = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
        return cls(ids, rest, jnp.concatenate([of_entries, tail], axis=-1))

    def holds(self, tokens: Int[Array, "*n"]) -> Bool[Array, "*n E1"]:
        """True on the bucket that each token is in."""
        is_own = self.ids == tokens[..., None]
        in_tail = ~jnp.any(is_own, axis=-1, keepdims=True)
        return jnp.concatenate([is_own, in_tail], axis=-1)

    def spread(self, slope: Float[Array, "*n E1"]) -> Float[Array, "*n V"]:
        """Slopes in the buckets' log-probabilities to slopes in those of the tokens.

        d log q_tail / d log q_v = q_v / q_tail: each token of the tail takes its share.
        """
        tail = self.log_probs[..., -1:]
        # Of an empty tail no token is left to take any.
        share = jnp.exp(self.rest - jnp.where(jnp.isneginf(tail), 0.0, tail))
        of_tail = jnp.where(share > 0, share * slope[..., -1:], 0.0)
        return _put(of_tail, self.ids, slope[..., :-1])


def _put(values: Array, ids: Array, new: Array) -> Array:
    """Values with new ones at some places of the last axis; places out of bounds are left out."""
    return jnp.put_along_axis(values, ids, new, axis=-1, inplace=False, mode="drop")
