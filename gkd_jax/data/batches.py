"""Assembly of batches from examples, which are given by their numbers in the data set."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gkd_jax.common.array_types import Int
from gkd_jax.common.batch import Batch
from gkd_jax.common.moved import load_moved
from gkd_jax.data import packed_rows
from gkd_jax.data.encoding import RowReader
from gkd_jax.data.packed_rows import Placement, TokenizedExample
from gkd_jax.data.teacher_store import StoreReader

MAX_EXAMPLE_ID = 2**31 - 1
"""The id of an example is its position in the global training order, modulo this number."""

_INPUTS, _TARGETS, _TEACHER_INPUTS = range(3)


@dataclasses.dataclass
class BatchMaker:
    """Reads examples and assembles them into batches.

    Attributes:
      rows: reads prompts and outputs.
      widths: lengths of prompts, outputs and the teacher's prompts.
      pad_id: padding token.
      teacher_rows: reads the teacher's prompts, if they differ from the student's.
      stored_teacher: a teacher's stored distributions for the outputs, if batches include them.
      source_id: maps the number of an example to its source in a mixture. None if batches do not
        include `source_id`.
    """

    rows: RowReader
    widths: tuple[int, int, int]
    pad_id: int
    teacher_rows: RowReader | None = None
    stored_teacher: StoreReader | None = None
    source_id: Callable[[int], int] | None = None

    def batch(self, examples: Int[np.ndarray, " B"], example_id: Int[np.ndarray, " B"]) -> Batch:
        """Returns a batch with one row per example; the number -1 gives a filler row."""
        rows = self.rows.read(examples)
        more: dict[str, Any] = {}
        if self.teacher_rows is not None:
            read = self.teacher_rows.read(examples).batch(example_id)
            more |= {"teacher_inputs": read.inputs, "teacher_inputs_mask": read.inputs_mask}
        if self.source_id is not None:
            ids = [self.source_id(int(number)) if number >= 0 else 0 for number in examples]
            more["source_id"] = np.array(ids, np.int32)
        if self.stored_teacher is not None:
            more["stored_teacher"] = self.stored_teacher.read(
                examples, rows.tokens(), target_length=self.widths[_TARGETS]
            )
        return dataclasses.replace(rows.batch(example_id), **more)

    def tokenized(
        self, examples: Int[np.ndarray, " N"], positions: Int[np.ndarray, " N"]
    ) -> list[TokenizedExample]:
        """Returns examples without padding, to be packed.

        Args:
          examples: numbers of the examples.
          positions: positions of these examples in the global order.
        """
        features: Iterable[tuple[np.ndarray, ...]] = self.rows.read(examples).tokens()
        if self.teacher_rows is not None:
            prompts = [prompt for prompt, _ in self.teacher_rows.read(examples).tokens()]
            features = [(*own, other) for own, other in zip(features, prompts, strict=True)]
        return [
            TokenizedExample(number, position, arrays)
            for number, position, arrays in zip(
                examples.tolist(), positions.tolist(), features, strict=True
            )
        ]

    @property
    def packed_widths(self) -> tuple[int, ...]:
        """Lengths of the features of `tokenized` examples."""
        return self.widths[: 2 if self.teacher_rows is None else 3]

    def packed_batches(
        self,
        examples: Iterable[TokenizedExample],
        batch_size: int,
        *,
        first_row: int,
        num_rows: int,
    ) -> Iterator[tuple[Batch, int]]:
        """Yields some rows of each packed batch, and the number of examples in the whole batch.

        Args:
          examples: examples in the global order.
          batch_size: number of rows of the whole batch.
          first_row: index, in the whole batch, of the first row to return.
          num_rows: number of rows to return.
        """
        for placements in packed_rows.assign_rows(
            examples, num_rows=batch_size, widths=self.packed_widths
        ):
            own = [
                dataclasses.replace(placement, row=placement.row - first_row)
                for placement in placements
                if first_row <= placement.row < first_row + num_rows
            ]
            yield self._packed(own, num_rows), len(placements)

    def _packed(self, placements: Sequence[Placement], num_rows: int) -> Batch:
        def rows_of(feature: int) -> tuple[np.ndarray, np.ndarray]:
            return packed_rows.rows_of_feature(
                placements,
                feature,
                num_rows=num_rows,
                width=self.widths[feature],
                pad_id=self.pad_id,
            )

        inputs, inputs_segments = rows_of(_INPUTS)
        targets, targets_segments = rows_of(_TARGETS)
        # A batch ends only when an example fits in none of its rows, so no row is empty.
        example_id = np.zeros(num_rows, np.int32)
        for placement in placements:
            if placement.segment == 1:
                example_id[placement.row] = placement.example.position % MAX_EXAMPLE_ID
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
            arrays["teacher_inputs"], segments = rows_of(_TEACHER_INPUTS)
            arrays |= {"teacher_inputs_mask": segments > 0, "teacher_inputs_segments": segments}
        if self.source_id is not None:
            arrays["source_id"] = np.zeros_like(targets)
            for placement in placements:
                source = self.source_id(placement.example.number)
                packed_rows.write(arrays["source_id"], placement, _TARGETS, source)
        if self.stored_teacher is not None:
            arrays["stored_teacher"] = self.stored_teacher.read(
                np.array([placement.example.number for placement in placements], np.int64),
                [(one.example.features[_INPUTS], one.example.features[_TARGETS])
                 for one in placements],
                target_length=self.widths[_TARGETS],
                starts=[(placement.row, placement.starts[_TARGETS]) for placement in placements],
                num_rows=num_rows,
            )  # fmt: skip
        return Batch(**arrays)


def __getattr__(name: str) -> Any:
    """Returns a name that this module defined in earlier versions."""
    return load_moved(__name__, name)
