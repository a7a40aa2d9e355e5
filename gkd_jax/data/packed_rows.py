"""Several examples in one row: which goes where, and the rows that come of it.

Examples are taken in their global order. Each goes to the first row that still has room for its
prompt and for its output; the first that no row has room for closes the batch and begins the next
one. So a batch is a run of consecutive positions in that order, none left out and none put off, and
the position of the next example is all that there is to remember.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gkd_jax.common.array_types import Int


@dataclasses.dataclass(frozen=True)
class Piece:
    """An example that is to be part of a row.

    Attributes:
      number: in the data set.
      position: in the global order.
      parts: tokens of the prompt, of the output and, where it reads another one, of the teacher's
        prompt, without padding.
    """

    number: int
    position: int
    parts: tuple[Int[np.ndarray, " l"], ...]

    @property
    def lengths(self) -> Int[np.ndarray, " F"]:
        """Number of tokens of each part."""
        return np.array([len(part) for part in self.parts])


@dataclasses.dataclass(frozen=True)
class Placed:
    """An example and its place.

    Attributes:
      piece: the example.
      row: of the global batch.
      segment: which example of its row it is, from 1 on.
      starts: where in the row each part begins.
    """

    piece: Piece
    row: int
    segment: int
    starts: tuple[int, ...]


def place(
    pieces: Iterable[Piece], *, num_rows: int, widths: Sequence[int]
) -> Iterator[list[Placed]]:
    """Gives the examples of one global batch after the other, each with its place.

    Args:
      pieces: in the global order; what does not fill a batch at their end is left out.
      num_rows: rows of a global batch.
      widths: lengths of a row's parts; no example has longer ones.
    """
    taken = np.zeros((num_rows, len(widths)), np.int64)
    counts = np.zeros(num_rows, np.int64)
    batch: list[Placed] = []
    for piece in pieces:
        lengths = piece.lengths
        has_room = np.all(taken + lengths <= widths, axis=1)
        row = int(np.argmax(has_room))
        if not has_room[row]:
            yield batch
            taken[:], counts[:], batch, row = 0, 0, [], 0
        counts[row] += 1
        batch.append(Placed(piece, row, int(counts[row]), tuple(taken[row].tolist())))
        taken[row] += lengths


@dataclasses.dataclass(frozen=True)
class Packed:
    """How well rows are filled.

    Attributes:
      examples_per_row: on average.
      share: of the places in the rows, those that hold a token.
    """

    examples_per_row: float
    share: float

    def __str__(self) -> str:
        return (
            f"about {self.examples_per_row:.1f} examples a row; {self.share:.0%} of its places "
            "hold a token"
        )


def measure(
    pieces: Iterable[Piece], *, num_rows: int, widths: Sequence[int], at_least: int
) -> Packed:
    """Packs whole batches of so many examples or more, on trial."""
    examples = tokens = batches = 0
    for placed in place(pieces, num_rows=num_rows, widths=widths):
        batches += 1
        examples += len(placed)
        tokens += int(sum(one.piece.lengths.sum() for one in placed))
        if examples >= at_least:
            break
    rows = batches * num_rows
    return Packed(examples_per_row=examples / rows, share=tokens / (rows * sum(widths)))


def fill(
    placed: Iterable[Placed], part: int, *, num_rows: int, width: int, pad_id: int
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """One part of all rows: its tokens, and the segments that they are of; 0 is padding."""
    tokens = np.full((num_rows, width), pad_id, np.int32)
    segments = np.zeros((num_rows, width), np.int32)
    for one in placed:
        put(tokens, one, part, one.piece.parts[part])
        put(segments, one, part, one.segment)
    return tokens, segments


def put(array: np.ndarray, one: Placed, part: int, value: Any) -> None:
    """Writes a value, or one for each token, to where a part of an example lies."""
    start = one.starts[part]
    array[one.row, start : start + len(one.piece.parts[part])] = value
