"""Examples to rows of token ids: end of sequence, truncation, padding, and a cache of rows.

Nothing here knows of order, batches or processes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gkd_jax.common.array_types import Int
from gkd_jax.common.batch import Batch
from gkd_jax.data.task import TextExample
from gkd_jax.data.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Text to token ids, without padding.

    As in seqio (`append_eos_after_trim`), text is cut on the right to length - 1 and one
    end-of-sequence token follows, also where the text was cut.

    Attributes:
      vocabulary: its first `eos_ids` ends a sequence; one without any appends none.
      inputs_length: longest prompt, end of sequence included.
      targets_length: longest output, end of sequence included.
      inputs_eos: whether prompts end with the end-of-sequence token.
      cut_inputs: the side on which a prompt that is too long is cut, 'right' or 'left'.
      inputs_bos: whether prompts begin with the vocabulary's `bos_id`, which it then has.
      eos_after_cut_targets: whether an output that was cut still ends with it.
    """

    vocabulary: Vocabulary
    inputs_length: int
    targets_length: int
    inputs_eos: bool = True
    eos_after_cut_targets: bool = True
    inputs_bos: bool = False
    cut_inputs: str = "right"

    def encode(self, example: TextExample) -> tuple[list[int], list[int], int, int]:
        """Token ids of prompt and output, and how long each would be without cutting.

        A prompt without any token becomes one token (end of sequence, or else padding), so that
        no model attends to nothing.
        """
        inputs = self._ids(example.inputs, example.inputs_ids, "inputs_ids")
        targets = self._ids(example.targets, example.targets_ids, "targets_ids")
        eos = self.vocabulary.eos_ids[:1]
        bos_id = self.vocabulary.bos_id if self.inputs_bos else None
        if bos_id is not None and inputs[:1] != [bos_id]:
            inputs = [bos_id, *inputs]  # A chat template may have written it.
        inputs_eos = eos if self.inputs_eos else ()
        over = len(inputs) + len(inputs_eos) - self.inputs_length
        if self.cut_inputs == "left" and over > 0:
            start = 0 if bos_id is None else 1
            inputs = [*inputs[:start], *inputs[start + over :]]
        inputs, inputs_full = _finish(inputs, self.inputs_length, inputs_eos)
        inputs_full += max(over, 0) if self.cut_inputs == "left" else 0
        targets, targets_full = _finish(
            targets, self.targets_length, eos, keep_eos=self.eos_after_cut_targets
        )
        if not inputs:
            inputs, inputs_full = [self.filler_id], 1
        return inputs, targets, inputs_full, targets_full

    @property
    def filler_id(self) -> int:
        """The one token of a prompt that has no other."""
        return (*self.vocabulary.eos_ids, self.vocabulary.pad_id)[0]

    def _ids(self, text: str, ids: Sequence[int] | None, field: str) -> list[int]:
        if ids is None:
            return self.vocabulary.encode(text)
        unknown = [token for token in ids if not 0 <= token < self.vocabulary.size]
        if unknown:
            raise ValueError(
                f"TextExample.{field} holds token {unknown[0]}, which {self.vocabulary.name} with "
                f"{self.vocabulary.size} ids lacks. Set DatasetConfig.vocabulary to the one that "
                "made these tokens."
            )
        ended = bool(ids) and ids[-1] in self.vocabulary.eos_ids
        return list(ids[:-1] if ended else ids)


def _finish(
    ids: list[int], length: int, eos: tuple[int, ...], *, keep_eos: bool = True
) -> tuple[list[int], int]:
    """Cuts to `length` with the end of sequence (none or one token) included."""
    full = len(ids) + len(eos)
    if full <= length:
        return [*ids, *eos], full
    if not keep_eos:
        return ids[:length], full
    return [*ids[: length - len(eos)], *eos], full


@dataclasses.dataclass(frozen=True)
class Rows:
    """Padded rows of some examples.

    `full_lengths` has columns for prompt and output: their lengths before cutting.
    """

    inputs: Int[np.ndarray, "B S"]
    targets: Int[np.ndarray, "B T"]
    full_lengths: Int[np.ndarray, "B 2"]

    def tokens(self) -> list[tuple[Int[np.ndarray, " s"], Int[np.ndarray, " t"]]]:
        """Prompt and output of each row, without padding."""
        rows = zip(self.inputs, self.targets, self.full_lengths.tolist(), strict=True)
        return [(inputs[:s], targets[:t]) for inputs, targets, (s, t) in rows]

    def batch(self, example_id: Int[np.ndarray, " B"]) -> Batch:
        """A batch of NumPy arrays with explicit masks and weights."""

        def real(width: int, full_length: np.ndarray) -> np.ndarray:
            return np.arange(width)[None, :] < full_length[:, None]

        loss_weights = real(self.targets.shape[1], self.full_lengths[:, 1])
        # The fields of a Batch are arrays of either kind: these stay in the host's memory.
        arrays: dict[str, Any] = {
            "inputs": self.inputs,
            "inputs_mask": real(self.inputs.shape[1], self.full_lengths[:, 0]),
            "targets": self.targets,
            "loss_weights": loss_weights.astype(np.float32),
            "example_id": example_id.astype(np.int32),
        }
        return Batch(**arrays)


class RowReader:
    """Reads rows by example number, each example tokenised once where the cache may hold it.

    Safe to call from several threads: two may make the same row, which is the same row.

    Args:
      read_text: example number to text.
      encoder: text to ids.
      num_examples: number of examples.
      cache_bytes: rows are kept if those of all examples fit in this much memory.
    """

    def __init__(
        self,
        read_text: Callable[[int], TextExample],
        encoder: Encoder,
        *,
        num_examples: int,
        cache_bytes: int,
    ):
        self._read_text = read_text
        self._encoder = encoder
        # Half the memory where ids fit in 16 bits.
        dtype = np.dtype(np.uint16 if encoder.vocabulary.size <= 1 << 16 else np.int32)
        row_bytes = (encoder.inputs_length + encoder.targets_length) * dtype.itemsize + 8
        self.caches = num_examples * row_bytes <= cache_bytes
        if self.caches:
            # Pages of memory are taken by the system when they are first written.
            self._cache = self._empty(num_examples, dtype)
            self._is_cached = np.zeros(num_examples, bool)

    def _empty(self, num_rows: int, dtype: np.dtype) -> Rows:
        def padding(width: int) -> np.ndarray:
            pad_id = self._encoder.vocabulary.pad_id
            if pad_id == 0:
                return np.zeros((num_rows, width), dtype)
            return np.full((num_rows, width), pad_id, dtype)

        return Rows(
            inputs=padding(self._encoder.inputs_length),
            targets=padding(self._encoder.targets_length),
            full_lengths=np.zeros((num_rows, 2), np.int32),
        )

    def _fill(self, rows: Rows, row: int, example: int) -> None:
        inputs, targets, *full_lengths = self._encoder.encode(self._read_text(example))
        rows.inputs[row, : len(inputs)] = inputs
        rows.targets[row, : len(targets)] = targets
        rows.full_lengths[row] = full_lengths

    def read(self, examples: Int[np.ndarray, " B"]) -> Rows:
        """Rows of the examples with these numbers, as new arrays of int32.

        A number of -1 gives a filler row: a prompt of one token and an output of none.
        """
        rows = self._empty(len(examples), np.dtype(np.int32))
        filler = examples < 0
        rows.inputs[filler, 0] = self._encoder.filler_id
        rows.full_lengths[filler] = (1, 0)
        if not self.caches:
            for row in np.flatnonzero(~filler):
                self._fill(rows, int(row), int(examples[row]))
            return rows
        real = examples[~filler]
        for example in real[~self._is_cached[real]]:
            self._fill(self._cache, int(example), int(example))
            self._is_cached[example] = True  # Last, so that no thread reads half a row.
        rows.inputs[~filler] = self._cache.inputs[real]
        rows.targets[~filler] = self._cache.targets[real]
        rows.full_lengths[~filler] = self._cache.full_lengths[real]
        return rows
