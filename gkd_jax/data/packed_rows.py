"""Packing: several examples in one row.

Examples are taken in their global order. Each is placed in the first row that has room for its
prompt and for its output. The first example that fits in no row closes the batch and starts the
next one. A batch is therefore a contiguous run of positions in the global order, and the position
of the next example is the only state.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gkd_jax.common.array_types import Int


@dataclasses.dataclass(frozen=True)
class TokenizedExample:
    """Token ids of one example, without padding.

    Attributes:
      number: number of the example in the data set.
      position: position of the example in the global order.
      features: token ids of the prompt, of the output and, if the teacher reads another prompt, of
        the teacher's prompt.
    """

    number: int
    position: int
    features: tuple[Int[np.ndarray, " l"], ...]

    @property
    def lengths(self) -> Int[np.ndarray, " F"]:
        """Number of tokens of each feature."""
        return np.array([len(feature) for feature in self.features])


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of an example in a packed batch.

    Attributes:
      example: the example.
      row: row of the global batch.
      segment: rank of the example within its row, from 1.
      starts: for each feature, the position in the row at which its first token is placed.
    """

    example: TokenizedExample
    row: int
    segment: int
    starts: tuple[int, ...]


def assign_rows(
    examples: Iterable[TokenizedExample], *, num_rows: int, widths: Sequence[int]
) -> Iterator[list[Placement]]:
    """Yields the placements of one global batch after another.

    Args:
      examples: examples in the global order. At the end, examples that do not fill a batch are
        dropped.
      num_rows: number of rows of a global batch.
      widths: for each feature, the length of a row. No example may have a longer feature.
    """
    taken = np.zeros((num_rows, len(widths)), np.int64)
    num_segments = np.zeros(num_rows, np.int64)
    batch: list[Placement] = []
    for example in examples:
        lengths = example.lengths
        has_room = np.all(taken + lengths <= widths, axis=1)
        row = int(np.argmax(has_room))
        if not has_room[row]:
            yield batch
            taken[:], num_segments[:], batch, row = 0, 0, [], 0
        num_segments[row] += 1
        batch.append(Placement(example, row, int(num_segments[row]), tuple(taken[row].tolist())))
        taken[row] += lengths


@dataclasses.dataclass(frozen=True)
class PackingStatistics:
    """How densely rows are filled.

    Attributes:
      examples_per_row: mean number of examples per row.
      token_share: fraction of the positions in the rows that hold a token.
    """

    examples_per_row: float
    token_share: float

    def __str__(self) -> str:
        return (
            f"about {self.examples_per_row:.1f} examples a row; {self.token_share:.0%} of its "
            "positions hold a token"
        )


def measure(
    examples: Iterable[TokenizedExample],
    *,
    num_rows: int,
    widths: Sequence[int],
    num_examples: int,
) -> PackingStatistics:
    """Measures how densely rows are filled, over the first batches.

    Whole batches are measured until they contain at least `num_examples` examples.
    """
    num_placed = num_tokens = num_batches = 0
    for placements in assign_rows(examples, num_rows=num_rows, widths=widths):
        num_batches += 1
        num_placed += len(placements)
        num_tokens += int(sum(placement.example.lengths.sum() for placement in placements))
        if num_placed >= num_examples:
            break
    rows = num_batches * num_rows
    return PackingStatistics(
        examples_per_row=num_placed / rows, token_share=num_tokens / (rows * sum(widths))
    )


def rows_of_feature(
    placements: Iterable[Placement], feature: int, *, num_rows: int, width: int, pad_id: int
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Returns the token ids of one feature, and the segment of each token (0 on padding)."""
    tokens = np.full((num_rows, width), pad_id, np.int32)
    segments = np.zeros((num_rows, width), np.int32)
    for placement in placements:
        write(tokens, placement, feature, placement.example.features[feature])
        write(segments, placement, feature, placement.segment)
    return tokens, segments


def write(array: np.ndarray, placement: Placement, feature: int, value: Any) -> None:
    """Writes a value, or one value per token, to the positions of a placed example's feature."""
    start = placement.starts[feature]
    length = len(placement.example.features[feature])
    array[placement.row, start : start + length] = value
