"""Encoding of examples as rows of token ids: end of sequence, truncation, padding, and a cache.

Nothing in this module depends on the order of examples, the batch size or the processes.
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
    """Converts text to token ids, without padding.

    As in seqio (`append_eos_after_trim`), text is cut on the right to length - 1 tokens and one
    end-of-sequence token is appended, even if the text was cut.

    Attributes:
      vocabulary: the vocabulary. The first of its `eos_ids` ends a sequence; if it has none, no
        token is appended.
      inputs_length: maximum length of a prompt, including the end-of-sequence token.
      targets_length: maximum length of an output, including the end-of-sequence token.
      inputs_eos: whether prompts end with the end-of-sequence token.
      eos_after_cut_targets: whether an output that was cut ends with the end-of-sequence token.
      inputs_bos: whether prompts start with the vocabulary's `bos_id`, which must exist.
      cut_inputs: the side on which a prompt that is too long is cut, 'right' or 'left'.
    """

    vocabulary: Vocabulary
    inputs_length: int
    targets_length: int
    inputs_eos: bool = True
    eos_after_cut_targets: bool = True
    inputs_bos: bool = False
    cut_inputs: str = "right"

    def encode(self, example: TextExample) -> tuple[list[int], list[int], int, int]:
        """Returns the token ids of prompt and output, and their lengths before truncation.

        An empty prompt becomes one token (end of sequence, or else padding), so that a model
        always has a token to attend to.
        """
        inputs = self._ids(example.inputs, example.inputs_ids, "inputs_ids")
        targets = self._ids(example.targets, example.targets_ids, "targets_ids")
        eos = self.vocabulary.eos_ids[:1]
        bos_id = self.vocabulary.bos_id if self.inputs_bos else None
        if bos_id is not None and inputs[:1] != [bos_id]:
            inputs = [bos_id, *inputs]  # A chat template may already contain this token.
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
        """The token that replaces an empty prompt."""
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
    """Appends `eos` (zero or one token) and truncates to `length`.

    A truncated sequence also ends with `eos`, unless `keep_eos` is False. The second return value
    is the length before truncation.
    """
    full = len(ids) + len(eos)
    if full <= length:
        return [*ids, *eos], full
    if not keep_eos:
        return ids[:length], full
    return [*ids[: length - len(eos)], *eos], full


@dataclasses.dataclass(frozen=True)
class Rows:
    """Padded rows of token ids of several examples.

    Attributes:
      inputs: token ids of the prompts.
      targets: token ids of the outputs.
      full_lengths: lengths of prompt and output before truncation.
    """

    inputs: Int[np.ndarray, "B S"]
    targets: Int[np.ndarray, "B T"]
    full_lengths: Int[np.ndarray, "B 2"]

    def tokens(self) -> list[tuple[Int[np.ndarray, " s"], Int[np.ndarray, " t"]]]:
        """Returns prompt and output of each row, without padding."""
        rows = zip(self.inputs, self.targets, self.full_lengths.tolist(), strict=True)
        return [(inputs[:s], targets[:t]) for inputs, targets, (s, t) in rows]

    def batch(self, example_id: Int[np.ndarray, " B"]) -> Batch:
        """Returns a batch of NumPy arrays with explicit masks and weights."""

        def real(width: int, full_length: np.ndarray) -> np.ndarray:
            return np.arange(width)[None, :] < full_length[:, None]

        loss_weights = real(self.targets.shape[1], self.full_lengths[:, 1])
        # A Batch may hold JAX or NumPy arrays. This one holds NumPy arrays, in host memory.
        arrays: dict[str, Any] = {
            "inputs": self.inputs,
            "inputs_mask": real(self.inputs.shape[1], self.full_lengths[:, 0]),
            "targets": self.targets,
            "loss_weights": loss_weights.astype(np.float32),
            "example_id": example_id.astype(np.int32),
        }
        return Batch(**arrays)


class RowReader:
    """Reads rows by example number, and encodes each example once if the cache is large enough.

    Can be called from several threads: two threads that encode the same example get equal rows.

    Args:
      read_text: maps the number of an example to its text.
      encoder: converts text to token ids.
      num_examples: number of examples.
      cache_bytes: size limit of the cache. Rows are cached only if the rows of all examples
        fit.

    Attributes:
      caches: whether rows are cached.
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
        # Ids that fit in 16 bits take half the memory.
        dtype = np.dtype(np.uint16 if encoder.vocabulary.size <= 1 << 16 else np.int32)
        row_bytes = (encoder.inputs_length + encoder.targets_length) * dtype.itemsize + 8
        self.caches = num_examples * row_bytes <= cache_bytes
        if self.caches:
            # If the padding id is 0, memory is allocated only when rows are first written.
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
        """Returns the rows of the examples with the given numbers, as new int32 arrays.

        The number -1 gives a filler row: a prompt of one token and an empty output.
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
