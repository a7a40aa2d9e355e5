"""Packings of a teacher's next-token distributions into bytes, one example at a time."""

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np

from gkd_jax.common.array_types import Float, Int
from gkd_jax.common.batch import TeacherDistributions


class Packing(abc.ABC):
    """Packs the distributions at n tokens into bytes, and unpacks them into a row of a batch."""

    kind: ClassVar[str]

    @abc.abstractmethod
    def empty(self, num_rows: int, target_length: int, num_entries: int) -> Any:
        """Returns distributions [B, T, E] without content, to be filled by `unpack`.

        Args:
          num_rows: B.
          target_length: T.
          num_entries: E, the largest number of entries that the store has for a token.
        """

    @abc.abstractmethod
    def unpack(self, block: bytes, num_tokens: int, rows: Any, row: int) -> None:
        """Writes the distributions of a block to the first `num_tokens` positions of a row."""

    def describe(self) -> dict[str, Any]:
        """Returns a JSON description, from which `packing_of` makes an equal packing."""
        return {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class Whole(Packing):
    """Log-probabilities of the whole vocabulary.

    Attributes:
      vocab_size: V, the number of vocabulary entries.
      dtype: 'float32' or 'float16'.
    """

    vocab_size: int
    dtype: str
    kind: ClassVar[str] = "whole"

    def pack(self, log_probs: Float[np.ndarray, "n V"]) -> tuple[bytes, int]:
        """Returns the bytes and the number of entries per token."""
        return log_probs.astype(f"<{np.dtype(self.dtype).str[1:]}").tobytes(), self.vocab_size

    def empty(self, num_rows: int, target_length: int, num_entries: int) -> Any:
        shape = (num_rows, target_length, num_entries)
        return _made_of(log_probs=np.zeros(shape, self.dtype))

    def unpack(self, block: bytes, num_tokens: int, rows: Any, row: int) -> None:
        values = np.frombuffer(block, f"<{np.dtype(self.dtype).str[1:]}")
        rows.log_probs[row, :num_tokens] = values.reshape(num_tokens, self.vocab_size)


@dataclasses.dataclass(frozen=True)
class Entries(Packing):
    """A fixed number of entries per token (ids and log-probabilities), and the log of the tail.

    Attributes:
      vocab_size: V, which determines the number of bytes of an id.
      num_entries: E, the number of entries per token.
      dtype: 'float32' or 'float16'.
    """

    vocab_size: int
    num_entries: int
    dtype: str
    kind: ClassVar[str] = "entries"

    def pack(
        self,
        ids: Int[np.ndarray, "n E"],
        log_probs: Float[np.ndarray, "n E"],
        tail: Float[np.ndarray, " n"],
    ) -> tuple[bytes, int]:
        """Returns the bytes and the number of entries per token."""
        values = np.concatenate([log_probs, tail[:, None]], axis=1)
        packed = values.astype(f"<{np.dtype(self.dtype).str[1:]}").tobytes()
        return _pack_ids(ids, self.vocab_size) + packed, self.num_entries

    def empty(self, num_rows: int, target_length: int, num_entries: int) -> Any:
        return _all_in_tail(num_rows, target_length, num_entries)

    def unpack(self, block: bytes, num_tokens: int, rows: Any, row: int) -> None:
        num_ids = num_tokens * self.num_entries
        split = num_ids * id_bytes(self.vocab_size)
        ids = _unpack_ids(block[:split], self.vocab_size)
        values = np.frombuffer(block[split:], f"<{np.dtype(self.dtype).str[1:]}")
        values = values.reshape(num_tokens, self.num_entries + 1)
        rows.ids[row, :num_tokens] = ids.reshape(num_tokens, self.num_entries)
        rows.log_probs[row, :num_tokens] = values[:, :-1]
        rows.tail[row, :num_tokens] = values[:, -1]


@dataclasses.dataclass(frozen=True)
class Counts(Packing):
    """The distinct tokens that were sampled at each position, with their counts.

    The number of entries varies by position.

    Attributes:
      vocab_size: V, which determines the number of bytes of an id.
      num_draws: N, the number of draws per position, which determines the number of bytes of a
        count.
    """

    vocab_size: int
    num_draws: int
    kind: ClassVar[str] = "counts"

    @property
    def _count_type(self) -> str:
        return "<u1" if self.num_draws < 1 << 8 else "<u2"

    def pack(
        self, draws: Int[np.ndarray, "n N"], targets: Int[np.ndarray, " n"]
    ) -> tuple[bytes, int]:
        """Returns the bytes and the largest number of entries of a token.

        The output token is always among the entries, with a count of 0 if it was not drawn.
        """
        num_tokens = len(draws)
        offsets = np.arange(num_tokens)[:, None] * self.vocab_size
        own = (offsets[:, 0] + targets).astype(np.int64)
        drawn, counts = np.unique(
            np.concatenate([(offsets + draws).ravel(), own]), return_counts=True
        )
        counts[np.searchsorted(drawn, own)] -= 1
        num_entries = np.bincount(drawn // self.vocab_size, minlength=num_tokens)
        block = num_entries.astype("<u2").tobytes()
        block += _pack_ids(drawn % self.vocab_size, self.vocab_size)
        return block + counts.astype(self._count_type).tobytes(), int(num_entries.max(initial=0))

    def empty(self, num_rows: int, target_length: int, num_entries: int) -> Any:
        return _all_in_tail(num_rows, target_length, num_entries)

    def unpack(self, block: bytes, num_tokens: int, rows: Any, row: int) -> None:
        """Writes log(count / N); the tail has probability 0."""
        num_entries = np.frombuffer(block[: 2 * num_tokens], "<u2").astype(np.int64)
        total = int(num_entries.sum())
        split = 2 * num_tokens + total * id_bytes(self.vocab_size)
        ids = _unpack_ids(block[2 * num_tokens : split], self.vocab_size)
        counts = np.frombuffer(block[split:], self._count_type).astype(np.float32)
        token = np.repeat(np.arange(num_tokens), num_entries)
        starts = np.cumsum(num_entries) - num_entries
        entry = np.arange(total) - starts[token]
        rows.ids[row, token, entry] = ids
        with np.errstate(divide="ignore"):
            rows.log_probs[row, token, entry] = np.log(counts / np.float32(self.num_draws))
        rows.tail[row, :num_tokens] = -np.inf


def packing_of(description: dict[str, Any]) -> Packing:
    """Returns the packing that `Packing.describe` described."""
    kinds = {one.kind: one for one in (Whole, Entries, Counts)}
    settings = {name: value for name, value in description.items() if name != "kind"}
    return kinds[description["kind"]](**settings)


def id_bytes(vocab_size: int) -> int:
    """Returns the number of bytes (1 to 4) that every id of the vocabulary fits in."""
    return max(1, -(-(vocab_size - 1).bit_length() // 8))


def _pack_ids(ids: np.ndarray, vocab_size: int) -> bytes:
    as_bytes = np.ascontiguousarray(ids.ravel(), "<u4").view(np.uint8).reshape(-1, 4)
    return as_bytes[:, : id_bytes(vocab_size)].tobytes()


def _unpack_ids(block: bytes, vocab_size: int) -> Int[np.ndarray, " n"]:
    width = id_bytes(vocab_size)
    as_bytes = np.zeros((len(block) // width, 4), np.uint8)
    as_bytes[:, :width] = np.frombuffer(block, np.uint8).reshape(-1, width)
    return as_bytes.view("<u4")[:, 0].astype(np.int32)


def _all_in_tail(num_rows: int, target_length: int, num_entries: int) -> Any:
    shape = (num_rows, target_length, num_entries)
    return _made_of(
        log_probs=np.full(shape, -np.inf, np.float32),
        ids=np.full(shape, -1, np.int32),
        tail=np.zeros(shape[:2], np.float32),
    )


def _made_of(**arrays: Any) -> Any:
    # The type allows JAX or NumPy arrays. Here all fields are NumPy arrays, in host memory.
    return TeacherDistributions(**arrays)
