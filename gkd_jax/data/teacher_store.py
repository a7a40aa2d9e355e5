"""Teacher store: files with a teacher's next-token distributions for the outputs of a data set.

`meta.json` describes the store: teacher, data, vocabulary, temperature, and the packing into bytes.
`distributions.bin` contains one block of bytes per example, in the order of the data set.
`index.bin` contains one entry per block: the offset of the block's end, the block's checksum and a
checksum of the example's tokens. A block is written before its index entry. If a run is interrupted
while it writes a block, the incomplete block is detected and written again.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gkd_jax.common.array_types import Int
from gkd_jax.common.batch import TeacherDistributions
from gkd_jax.common.moved import load_moved
from gkd_jax.data.teacher_store_records import Packing, packing_of
from gkd_jax.data.vocabularies import Vocabulary

_FORMAT = "gkd_jax teacher store 1"
_META, _DATA, _INDEX = "meta.json", "distributions.bin", "index.bin"
_INDEX_ENTRY = np.dtype(
    [(name, "<u4") for name in ("checksum", "of_tokens", "num_tokens", "num_entries")]
    + [("end", "<u8")]
)


@dataclasses.dataclass(frozen=True)
class Block:
    """The stored distributions of one example.

    Attributes:
      content: the distributions, packed into bytes.
      num_entries: largest number of vocabulary entries stored for one token.
      inputs: token ids of the prompt, without padding.
      targets: token ids of the output, one for each distribution.
    """

    content: bytes
    num_entries: int
    inputs: Int[np.ndarray, " s"]
    targets: Int[np.ndarray, " t"]


def _checksum_of_tokens(inputs: np.ndarray, targets: np.ndarray) -> int:
    tokens = np.concatenate([[len(inputs)], inputs, targets])
    return zlib.crc32(tokens.astype("<i4").tobytes())


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describes how two mappings differ as 'name: ... before, ... now'; '' if they are equal."""
    return "; ".join(
        f"{key}: {before.get(key, 'unknown')} before, {now.get(key, 'unknown')} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )


class StoreWriter:
    """Writes a store example by example, and continues a store that was interrupted.

    Raises:
      ValueError: the folder contains another store or other files.
    """

    def __init__(self, folder: str | os.PathLike[str], description: Mapping[str, Any]):
        """Starts a store, or opens an incomplete one.

        Args:
          folder: folder of the store.
          description: everything that determines the content of the store, as JSON.
        """
        self._folder = pathlib.Path(folder)
        # Converted to JSON and back, so that tuples become lists as in the stored description.
        wanted = json.loads(json.dumps({"format": _FORMAT, **description}))
        if (self._folder / _META).exists():
            found = json.loads((self._folder / _META).read_text(encoding="utf-8"))
            if found != wanted:
                raise ValueError(
                    f"Storing.output {folder} holds a store of something else "
                    f"({differences(found, wanted)}). Set Storing.output to a new folder, or "
                    "remove that one."
                )
        else:
            self._begin(wanted)
        self._num_done, self._end = self._repair()

    def _begin(self, description: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if any(child.name != f"{_META}.new" for child in self._folder.iterdir()):
            raise ValueError(
                f"Storing.output {self._folder} is a folder of other files. Set Storing.output to "
                "a new folder."
            )
        scratch = self._folder / f"{_META}.new"
        scratch.write_text(json.dumps(description, indent=1), encoding="utf-8")
        scratch.rename(self._folder / _META)

    def _repair(self) -> tuple[int, int]:
        """Removes incomplete blocks.

        Returns:
          Number of complete blocks, and the offset of the end of the last one.
        """
        for name in (_DATA, _INDEX):
            (self._folder / name).touch()
        index = _read_index(self._folder)
        size = (self._folder / _DATA).stat().st_size
        index = index[: np.searchsorted(index["end"], size, side="right")]
        end = int(index["end"][-1]) if len(index) else 0
        os.truncate(self._folder / _INDEX, len(index) * _INDEX_ENTRY.itemsize)
        os.truncate(self._folder / _DATA, end)
        return len(index), end

    @property
    def num_done(self) -> int:
        """Number of examples written so far."""
        return self._num_done

    def append(self, blocks: Sequence[Block]) -> None:
        """Appends the next examples."""
        index = np.zeros(len(blocks), _INDEX_ENTRY)
        for entry, block in zip(index, blocks, strict=True):
            self._end += len(block.content)
            entry["end"] = self._end
            entry["checksum"] = zlib.crc32(block.content)
            entry["of_tokens"] = _checksum_of_tokens(block.inputs, block.targets)
            entry["num_tokens"] = len(block.targets)
            entry["num_entries"] = block.num_entries
        data = b"".join(block.content for block in blocks)
        for name, added in ((_DATA, data), (_INDEX, index.tobytes())):
            with open(self._folder / name, "ab") as file:
                file.write(added)
                file.flush()
                os.fsync(file.fileno())
        self._num_done += len(blocks)

    def summary(self) -> tuple[int, int]:
        """Returns the number of output tokens, and the size in bytes with the index."""
        index = _read_index(self._folder)
        return int(index["num_tokens"].sum()), self._end + index.nbytes


def _read_index(folder: pathlib.Path) -> np.ndarray:
    content = (folder / _INDEX).read_bytes()
    whole = len(content) // _INDEX_ENTRY.itemsize * _INDEX_ENTRY.itemsize
    return np.frombuffer(content[:whole], _INDEX_ENTRY)


class StoreReader:
    """Reads a complete store. Can be used from several threads.

    Attributes:
      description: the description that was given to the writer.
      packing: the packing of distributions into bytes.

    Raises:
      FileNotFoundError: the folder is not a store.
      ValueError: the store has another format or is incomplete.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = pathlib.Path(folder)
        if not (self._folder / _META).is_file():
            raise FileNotFoundError(
                f"StoredTeacher.path names {str(folder)!r}, which is no store of a teacher. Write "
                "one with --run_mode=store_teacher (gin_configs/store_teacher.gin)."
            )
        text = (self._folder / _META).read_text(encoding="utf-8")
        self.description: dict[str, Any] = json.loads(text)
        if self.description["format"] != _FORMAT:
            raise ValueError(
                f"the store {folder} is of the format {self.description['format']!r}, where "
                f"{_FORMAT!r} is wanted. Write it again with --run_mode=store_teacher."
            )
        self.packing: Packing = packing_of(self.description["packing"])
        self._index = _read_index(self._folder)
        num_examples = self.description["data"]["num_examples"]
        size = (self._folder / _DATA).stat().st_size
        if len(self._index) != num_examples or size < self._index["end"][-1]:
            raise ValueError(
                f"the store {folder} is not complete: it has {len(self._index)} of {num_examples} "
                "examples. Give the command that wrote it again: it goes on where it stopped."
            )
        self._data = np.memmap(self._folder / _DATA, np.uint8, mode="r")
        self._num_entries = int(self._index["num_entries"].max())

    @property
    def num_bytes(self) -> int:
        """Size in bytes, including the index."""
        return int(self._index["end"][-1]) + self._index.nbytes

    @property
    def num_tokens(self) -> int:
        """Number of output tokens."""
        return int(self._index["num_tokens"].sum())

    def __str__(self) -> str:
        about = self.description
        return (
            f"{about['support']} of {about['teacher']} at temperature {about['temperature']}, "
            f"{self.num_tokens:,} tokens of {self.num_bytes / max(self.num_tokens, 1):.1f} bytes"
        )

    @property
    def fingerprint(self) -> str:
        """A summary of the store, followed by a digest of its description."""
        text = json.dumps(self.description, sort_keys=True)
        return f"{self} ({hashlib.sha256(text.encode()).hexdigest()[:12]})"

    def check_data(self, vocabulary: Vocabulary, content: Mapping[str, Any]) -> None:
        """Checks that the store belongs to a data set.

        Args:
          vocabulary: the data set's vocabulary.
          content: the data set's content, as `Dataset.content`.

        Raises:
          ValueError: the store has another vocabulary or belongs to other data.
        """
        there, here = self.description["vocabulary"], vocabulary
        if there["fingerprint"] != here.fingerprint:
            raise ValueError(
                f"the store {self._folder} is of another vocabulary, so that its token ids mean "
                f"other pieces; got {there['name']} ({there['size']} ids, "
                f"{there['fingerprint'][:12]}) there and {here.name} ({here.size} ids, "
                f"{here.fingerprint[:12]}) here. Set "
                "DatasetConfig.vocabulary (VOCABULARY_PATH) to that one, or write the store again."
            )
        differing = differences(self.description["data"], content)
        if differing:
            raise ValueError(
                f"the store {self._folder} is of other data, or of other tokens of them "
                f"({differing}). Set StoredTeacher.path to the store of these data, or write one "
                "with --run_mode=store_teacher."
            )

    def read(
        self,
        examples: Int[np.ndarray, " N"],
        tokens: Sequence[tuple[Int[np.ndarray, " s"], Int[np.ndarray, " t"]]],
        *,
        target_length: int,
        starts: Sequence[tuple[int, int]] | None = None,
        num_rows: int | None = None,
    ) -> TeacherDistributions:
        """Returns the distributions at the output tokens of examples, as NumPy arrays.

        Args:
          examples: numbers of the examples in the data set; -1 stands for a filler row.
          tokens: prompt and output of each example, without padding.
          target_length: T, the padded length of the outputs.
          starts: for packed rows, the row and the first position of each output. None gives each
            example a row of its own.
          num_rows: B, the number of rows; None uses one row per example.

        Raises:
          ValueError: the tokens differ from those in the store, or the stored bytes are damaged.
        """
        rows = self.packing.empty(num_rows or len(examples), target_length, self._num_entries)
        starts = starts or [(row, 0) for row in range(len(examples))]
        for example, (inputs, targets), (row, start) in zip(
            examples.tolist(), tokens, starts, strict=True
        ):
            if example >= 0:
                block = self._block(example, inputs, targets)
                self.packing.unpack(block, len(targets), _from(rows, start), row)
        return rows

    def _block(self, example: int, inputs: np.ndarray, targets: np.ndarray) -> bytes:
        entry = self._index[example]
        start = int(self._index["end"][example - 1]) if example else 0
        block = self._data[start : int(entry["end"])].tobytes()
        if entry["of_tokens"] != _checksum_of_tokens(inputs, targets):
            raise ValueError(
                f"the store {self._folder} is of another prompt or output of example {example}. "
                "Write the store again for these data."
            )
        if entry["checksum"] != zlib.crc32(block):
            raise ValueError(
                f"the store {self._folder} is damaged: the bytes of example {example} are not "
                "those that were written. Copy it again from its source, or write it again."
            )
        return block


def _from(rows: TeacherDistributions, start: int) -> TeacherDistributions:
    """Returns writable views of the arrays, from position `start` on."""
    views: dict[str, Any] = {}
    for field in dataclasses.fields(rows):
        array = getattr(rows, field.name)
        views[field.name] = None if array is None else array[:, start:]
    return TeacherDistributions(**views)


def __getattr__(name: str) -> Any:
    """Returns a name that this module defined in earlier versions."""
    return load_moved(__name__, name)
