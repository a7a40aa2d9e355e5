"""Batches of examples that are named by number: what is in them, in whatever order they come."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gkd_jax.common.array_types import Int
from gkd_jax.common.batch import Batch
from gkd_jax.data import packed_rows
from gkd_jax.data.encoding import RowReader
from gkd_jax.data.packed_rows import Piece, Placed
from gkd_jax.data.teacher_store import TeacherStore

MAX_EXAMPLE_ID = 2**31 - 1
"""Ids of examples are their positions in the global order of training, modulo this."""


@dataclasses.dataclass
class BatchMaker:
    """Reads examples and makes batches of them.

    Attributes:
      rows: reads prompts and outputs.
      widths: lengths of prompts, of outputs and of the teacher's prompts.
      pad_id: fills up rows.
      teacher_rows: reads the teacher's prompts, where they are others.
      stored_teacher: what a teacher said of the outputs, where that is kept.
      source_id: number of an example's source in a mixture, where that is wanted.
    """

    rows: RowReader
    widths: tuple[int, int, int]
    pad_id: int
    teacher_rows: RowReader | None = None
    stored_teacher: TeacherStore | None = None
    source_id: Callable[[int], int] | None = None

    def batch(self, examples: Int[np.ndarray, " B"], example_id: Int[np.ndarray, " B"]) -> Batch:
        """A row for each example; a number of -1 is a filler row."""
        rows = self.rows.read(examples)
        more: dict[str, Any] = {}
        if self.teacher_rows is not None:
            read = self.teacher_rows.read(examples).batch(example_id)
            more |= {"teacher_inputs": read.inputs, "teacher_inputs_mask": read.inputs_mask}
        if self.source_id is not None:
            numbers = [self.source_id(int(one)) if one >= 0 else 0 for one in examples]
            more["source_id"] = np.array(numbers, np.int32)
        if self.stored_teacher is not None:
            more["stored_teacher"] = self.stored_teacher.read(
                examples, rows.tokens(), target_length=self.widths[1]
            )
        return dataclasses.replace(rows.batch(example_id), **more)

    def pieces(
        self, examples: Int[np.ndarray, " N"], positions: Int[np.ndarray, " N"]
    ) -> list[Piece]:
        """Examples without padding, to be packed."""
        tokens: Iterable[tuple[np.ndarray, ...]] = self.rows.read(examples).tokens()
        if self.teacher_rows is not None:
            prompts = [prompt for prompt, _ in self.teacher_rows.read(examples).tokens()]
            tokens = [(*own, other) for own, other in zip(tokens, prompts, strict=True)]
        numbers = zip(examples.tolist(), positions.tolist(), strict=True)
        return [Piece(*both, parts) for both, parts in zip(numbers, tokens, strict=True)]

    @property
    def packed_widths(self) -> tuple[int, ...]:
        """Lengths of the parts that `pieces` have."""
        return self.widths[: 2 if self.teacher_rows is None else 3]

    def packed_batches(
        self, pieces: Iterable[Piece], batch_size: int, *, first_row: int, num_rows: int
    ) -> Iterator[tuple[Batch, int]]:
        """Some rows of each packed batch, and how many examples all of its rows have.

        Args:
          pieces: examples in the global order.
          batch_size: rows of a batch.
          first_row: the first of the rows that are wanted.
          num_rows: how many.
        """
        for placed in packed_rows.place(pieces, num_rows=batch_size, widths=self.packed_widths):
            own = [
                dataclasses.replace(one, row=one.row - first_row)
                for one in placed
                if first_row <= one.row < first_row + num_rows
            ]
            yield self._packed(own, num_rows), len(placed)

    def _packed(self, own: Sequence[Placed], num_rows: int) -> Batch:
        def fill(part: int) -> tuple[np.ndarray, np.ndarray]:
            width = self.widths[part]
            return packed_rows.fill(own, part, num_rows=num_rows, width=width, pad_id=self.pad_id)

        (inputs, inputs_segments), (targets, targets_segments) = fill(0), fill(1)
        # A batch is closed by an example that no row has room for: every row has some.
        example_id = np.zeros(num_rows, np.int32)
        for one in own:
            if one.segment == 1:
                example_id[one.row] = one.piece.position % MAX_EXAMPLE_ID
        arrays: dict[str, Any] = {
            "inputs": inputs,
            "inputs_mask": inputs_segments > 0,
            "targets": targets,
            "loss_weights": (targets_segments > 0).astype(np.float32),
            "example_id": example_id,
            "inputs_segments": inputs_segments,
            "targets_segments": targets_segments,
        }
        if self.teacher_rows is not None:
            arrays["teacher_inputs"], segments = fill(2)
            arrays |= {"teacher_inputs_mask": segments > 0, "teacher_inputs_segments": segments}
        if self.source_id is not None:
            arrays["source_id"] = np.zeros_like(targets)
            for one in own:
                packed_rows.put(arrays["source_id"], one, 1, self.source_id(one.piece.number))
        if self.stored_teacher is not None:
            arrays["stored_teacher"] = self.stored_teacher.read(
                np.array([one.piece.number for one in own], np.int64),
                [(one.piece.parts[0], one.piece.parts[1]) for one in own],
                target_length=self.widths[1],
                places=[(one.row, one.starts[1]) for one in own],
                num_rows=num_rows,
            )
        return Batch(**arrays)
