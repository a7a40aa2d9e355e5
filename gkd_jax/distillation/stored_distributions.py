"""What is kept of a teacher's next-token distributions in a store, and how much it takes."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.common.array_types import Array, Float, Int, Key
from gkd_jax.data.teacher_store_records import Counts, Entries, Whole
from gkd_jax.objectives.buckets import Buckets
from gkd_jax.sampling.methods import Sample, row_keys

_MAX_DRAWS = (1 << 16) - 2  # With the output token, as many entries as two bytes count.


class Support(abc.ABC):
    """Chooses what is kept at each output token, on the devices, and packs it on the host."""

    @abc.abstractmethod
    def choose(
        self, log_probs: Float[Array, "B V"], targets: Int[Array, " B"], keys: Key[Array, " B"]
    ) -> tuple[Array, ...]:
        """What is kept of normalised distributions; jittable.

        Args:
          log_probs: log p, the temperature in it.
          targets: the output tokens, which are always among the entries: so a loss that reads
            them, such as cross-entropy beside a divergence, is exact.
          keys: one a token, used for nothing else.

        Returns:
          Arrays [B, ...] for `pack`.
        """

    @abc.abstractmethod
    def packing(self, vocab_size: int) -> Any:
        """How it is packed: `pack(*arrays)` takes what `choose` gives, of n tokens."""


def _check_dtype(owner: object, dtype: object) -> None:
    if dtype not in ("float32", "float16"):
        raise ValueError(
            f"{type(owner).__name__}.dtype must be 'float32' or 'float16'; got {dtype!r}. "
            "Log-probabilities of 'float16' have three digits."
        )


def _check_count(setting: str, value: object, most: int | None = None) -> None:
    if not isinstance(value, int) or value < 1 or (most is not None and value > most):
        upper = "on" if most is None else f"to {most:,}"
        raise ValueError(
            f"{setting} must be a whole number from 1 {upper}; got {value!r}. Set it so."
        )


@dataclasses.dataclass(frozen=True)
class Full(Support):
    """The whole distribution: every divergence is what it is with the teacher itself.

    Attributes:
      dtype: of the log-probabilities: 'float32' (4 V bytes a token) or 'float16'.
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_dtype(self, self.dtype)

    def choose(
        self, log_probs: Float[Array, "B V"], targets: Int[Array, " B"], keys: Key[Array, " B"]
    ) -> tuple[Array, ...]:
        """All."""
        del targets, keys
        return (log_probs.astype(self.dtype),)

    def packing(self, vocab_size: int) -> Whole:
        """V values."""
        return Whole(vocab_size, self.dtype)


@dataclasses.dataclass(frozen=True)
class TopK(Support):
    """The likeliest tokens, the output token, and the probability of all others together.

    A divergence to it is that of the two distributions in these buckets: at most the full one,
    to which it rises with k. A top-k without its tail would be no distribution.

    Attributes:
      k: entries besides the output token.
      dtype: of the log-probabilities: 'float16' or 'float32'.
    """

    k: int = 64
    dtype: str = "float16"

    def __post_init__(self) -> None:
        _check_count("TopK.k", self.k)
        _check_dtype(self, self.dtype)

    def choose(
        self, log_probs: Float[Array, "B V"], targets: Int[Array, " B"], keys: Key[Array, " B"]
    ) -> tuple[Array, ...]:
        """Ids, log p of each, log p of the tail."""
        del keys
        vocab_size = log_probs.shape[-1]
        is_target = targets[:, None] == lax.broadcasted_iota(targets.dtype, log_probs.shape, 1)
        first = jnp.where(is_target, jnp.inf, log_probs)
        _, ids = lax.top_k(first, self._num_entries(vocab_size))
        kept = Buckets.of(log_probs, ids).log_probs.astype(self.dtype)
        return ids, kept[:, :-1], kept[:, -1]

    def packing(self, vocab_size: int) -> Entries:
        """An id and a value for each, and the tail's value."""
        return Entries(vocab_size, self._num_entries(vocab_size), self.dtype)

    def _num_entries(self, vocab_size: int) -> int:
        return min(self.k + 1, vocab_size)


@dataclasses.dataclass(frozen=True)
class Draws(Support):
    """N tokens drawn from the distribution, and how often each was: random sampling KD.

    counts / N is an unbiased estimate of P, so the gradient of the forward KL to it, or of the
    cross-entropy, is unbiased (arXiv 2503.16870). Divergences that are not linear in P are not,
    and are refused. The value of the forward KL to it is too high: the entropy of the counts is
    below that of P.

    Attributes:
      num_draws: N. Few of them are different where the teacher is sure.
    """

    num_draws: int = 50

    def __post_init__(self) -> None:
        _check_count("Draws.num_draws", self.num_draws, _MAX_DRAWS)

    def choose(
        self, log_probs: Float[Array, "B V"], targets: Int[Array, " B"], keys: Key[Array, " B"]
    ) -> tuple[Array, ...]:
        """The drawn tokens, and the output token."""

        def draw(number: Array) -> Array:
            own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
            return Sample().choose(log_probs, keys=own)[0]

        return jax.vmap(draw, out_axes=1)(jnp.arange(self.num_draws)), targets

    def packing(self, vocab_size: int) -> Counts:
        """An id and a count for each token that was drawn."""
        return Counts(vocab_size, self.num_draws)


def token_keys(key: Key[Array, ""], example_id: Int[Array, " B"], position: Any) -> Any:
    """The key of each output token: of the example and its place in it, not of the row."""
    positions = jnp.full_like(example_id, position)
    return row_keys(key, example_id=example_id, sample_index=positions)


__all__ = ["Draws", "Full", "Support", "TopK", "token_keys"]
