"""Sparsification of a teacher's next-token distributions for precomputed stores."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.common.array_types import Array, Float, Int, Key
from gkd_jax.common.moved import load_moved
from gkd_jax.data.teacher_store_records import Counts, Entries, Whole
from gkd_jax.objectives.buckets import Buckets
from gkd_jax.sampling.methods import Sample, row_keys

# The number of entries, the output token included, is stored in two bytes.
_MAX_DRAWS = (1 << 16) - 2


class Sparsification(abc.ABC):
    """Base class: selects the entries of a distribution that are stored, and packs them.

    Entries are selected on the devices and packed on the host.
    """

    @abc.abstractmethod
    def choose(
        self, log_probs: Float[Array, "B V"], targets: Int[Array, " B"], keys: Key[Array, " B"]
    ) -> tuple[Array, ...]:
        """Selects entries of normalized distributions. Can be jitted.

        Args:
          log_probs: log p, with the temperature already applied.
          targets: output tokens. They are always selected, so that a loss term on the output token,
            such as a cross-entropy in addition to a divergence, is exact.
          keys: one random key per token, not used elsewhere.

        Returns:
          Arrays [B, ...], the arguments of `packing(...).pack`.
        """

    @abc.abstractmethod
    def packing(self, vocab_size: int) -> Any:
        """Returns an object whose `pack(*arrays)` packs the arrays that `choose` returned."""


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
class Full(Sparsification):
    """Stores the whole distribution.

    Divergences are the same as with the teacher itself, except for the rounding to `dtype`.

    Attributes:
      dtype: dtype of the log-probabilities: 'float32' (4 V bytes per token) or 'float16'.
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_dtype(self, self.dtype)

    def choose(
        self, log_probs: Float[Array, "B V"], targets: Int[Array, " B"], keys: Key[Array, " B"]
    ) -> tuple[Array, ...]:
        del targets, keys
        return (log_probs.astype(self.dtype),)

    def packing(self, vocab_size: int) -> Whole:
        return Whole(vocab_size, self.dtype)


@dataclasses.dataclass(frozen=True)
class TopK(Sparsification):
    """Stores the k most likely tokens, the output token, and the total probability of the others.

    Divergences are computed between the distributions over these k + 2 buckets. Such a divergence
    is at most the divergence of the full distributions, and approaches it as k grows. The total of
    the others, the tail, is needed because the top k probabilities alone do not sum to 1.

    Attributes:
      k: number of entries besides the output token.
      dtype: dtype of the log-probabilities: 'float16' or 'float32'.
    """

    k: int = 64
    dtype: str = "float16"

    def __post_init__(self) -> None:
        _check_count("TopK.k", self.k)
        _check_dtype(self, self.dtype)

    def choose(
        self, log_probs: Float[Array, "B V"], targets: Int[Array, " B"], keys: Key[Array, " B"]
    ) -> tuple[Array, ...]:
        """Returns ids, log p of each id, and log p of the tail."""
        del keys
        vocab_size = log_probs.shape[-1]
        is_target = targets[:, None] == lax.broadcasted_iota(targets.dtype, log_probs.shape, 1)
        first = jnp.where(is_target, jnp.inf, log_probs)
        _, ids = lax.top_k(first, self._num_entries(vocab_size))
        kept = Buckets.of(log_probs, ids).log_probs.astype(self.dtype)
        return ids, kept[:, :-1], kept[:, -1]

    def packing(self, vocab_size: int) -> Entries:
        return Entries(vocab_size, self._num_entries(vocab_size), self.dtype)

    def _num_entries(self, vocab_size: int) -> int:
        return min(self.k + 1, vocab_size)


@dataclasses.dataclass(frozen=True)
class Draws(Sparsification):
    """Stores N tokens drawn from the distribution, with their counts (random sampling KD).

    counts / N is an unbiased estimate of the distribution P, so gradients of the forward KL and of
    the cross-entropy are unbiased. Divergences that are not linear in P would be biased and are
    refused. The value of the forward KL is too high, since the entropy of the counts is lower than
    the entropy of P.

    Reference: "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", arXiv
    2503.16870.

    Attributes:
      num_draws: number of draws, N. If the teacher is confident, only few distinct tokens are
        drawn.
    """

    num_draws: int = 50

    def __post_init__(self) -> None:
        _check_count("Draws.num_draws", self.num_draws, _MAX_DRAWS)

    def choose(
        self, log_probs: Float[Array, "B V"], targets: Int[Array, " B"], keys: Key[Array, " B"]
    ) -> tuple[Array, ...]:
        def draw(number: Array) -> Array:
            own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
            return Sample().choose(log_probs, keys=own)[0]

        return jax.vmap(draw, out_axes=1)(jnp.arange(self.num_draws)), targets

    def packing(self, vocab_size: int) -> Counts:
        return Counts(vocab_size, self.num_draws)


def token_keys(key: Key[Array, ""], example_id: Int[Array, " B"], position: Any) -> Any:
    """Returns a key per output token, which depends on example and position but not on the row."""
    positions = jnp.full_like(example_id, position)
    return row_keys(key, example_id=example_id, sample_index=positions)


def __getattr__(name: str) -> Any:
    """Returns a name that this module defined in earlier versions."""
    return load_moved(__name__, name)


__all__ = ["Draws", "Full", "Sparsification", "TopK", "token_keys"]
