"""Safetensors files: memory-mapped reading, and writing one tensor at a time.

A file consists of the length of its header (8 bytes, little-endian), the header (JSON that maps
names to dtype, shape and offsets) and the bytes of the tensors; see
https://github.com/huggingface/safetensors. Files contain no code. The package `safetensors` is not
used because it holds all tensors of a file in memory while it writes them, and because it does not
support bfloat16 for NumPy.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from gkd_jax.checkpoints.manifest import CorruptCheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100 << 20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, whose values have not been read.

    Attributes:
      file: file that holds the tensor.
      dtype: dtype of the tensor.
      shape: shape of the tensor.
      offset: offset in bytes, from the start of the file, of the tensor's first byte.
    """

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def open(self) -> np.ndarray:
        """Returns the tensor as a read-only memory map, without reading its values."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, mode="r", offset=self.offset, shape=self.shape)


def read_directory(folder: epath.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a directory by name.

    The tensors are in the files that an index lists or, if there is no index, in a single file.

    Raises:
      FileNotFoundError: there are no safetensors files, or a file is missing.
      CorruptCheckpointError: a file is truncated or damaged.
    """
    index = folder / INDEX
    if not index.exists():
        single = folder / SINGLE
        if not single.exists():
            raise FileNotFoundError(
                f"{folder} holds no weights that can be read: it has neither {SINGLE} nor {INDEX}. "
                "Pickled weights (pytorch_model.bin) are never loaded, since they can run code: "
                "save the model once with `model.save_pretrained(..., safe_serialization=True)`."
            )
        return read_header(single)
    try:
        files = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{index} cannot be read: {error!r}.") from error
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(files.values())):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{index} names the file {name}, which is missing. Copy the checkpoint completely."
            )
        tensors |= read_header(folder / name)
    missing = sorted(set(files) - set(tensors))
    if missing:
        raise CorruptCheckpointError(
            f"{index} names tensors that no file holds, such as {missing[0]}. Copy the checkpoint "
            "again."
        )
    return tensors


def read_header(file: epath.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file by name.

    Raises:
      CorruptCheckpointError: the file is not a safetensors file, or is truncated.
    """
    size = file.stat().length
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(opened.read(length))
        tensors, end = {}, 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            first, last = entry["data_offsets"]
            if last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {last - first} bytes for {dtype}{list(shape)}")
            end = max(end, last)
            tensors[name] = StoredTensor(file, dtype, shape, 8 + length + first)
        if 8 + length + end > size:
            raise ValueError(f"it has {size} bytes of {8 + length + end}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(
            f"{file} is no whole safetensors file: {error}. Copy it again from its source."
        ) from error
    return tensors


def write_directory(
    folder: epath.Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterator[tuple[str, np.ndarray]],
    *,
    shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Writes tensors to files of at most `shard_bytes`, with an index if there are several files.

    Args:
      folder: an existing directory.
      shapes: shape and dtype by name, in the order of `tensors`.
      tensors: name and value of each tensor; only one at a time is held in memory.
      shard_bytes: maximum file size in bytes. A larger tensor is written to a file of its own.

    Returns:
      The names of the written files, including the index.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    )
    for file, shard in zip(names, shards, strict=True):
        write_file(folder / file, {name: shapes[name] for name in shard}, tensors)
    if count == 1:
        return names
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")
    return [*names, INDEX]


def write_file(
    file: epath.Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Writes one file with the tensors named in `shapes`.

    The function takes these tensors, in the order of `shapes`, from the iterator `tensors`. The
    iterator may continue with the tensors of the next file.
    """
    # `transformers` reads the framework from this entry and rejects files that lack it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        header[name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Aligns the tensors to 8 bytes.
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in shapes.items():
            given, value = next(tensors)
            assert given == name, (given, name)
            assert (value.shape, value.dtype) == (shape, dtype), name
            opened.write(np.ascontiguousarray(value).tobytes())
