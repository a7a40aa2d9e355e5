"""Reads one parameter of a foreign checkpoint, onto its sharding and in its dtype."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

DAMAGED = "The file is damaged or was not copied completely: copy the checkpoint again."


def read_leaf(name: str, leaf: Any, wanted: jax.ShapeDtypeStruct, folder: epath.Path) -> jax.Array:
    """Reads one parameter: an array (of memory or of a file), or a TensorStore spec.

    Each host reads only the parts that its devices hold.

    Raises:
      ValueError: it has another shape, holds no floating-point numbers, or cannot be read.
    """
    try:
        shape, read_part = _reader(leaf)
    except ValueError as error:
        raise _damaged(name, folder, error) from error
    if shape != wanted.shape:
        raise ValueError(
            f"{name} must have the shape of the model, {wanted.shape}; {folder} has {shape}. "
            "Check that the model's sizes (emb_dim, num_heads, head_dim, mlp_dim, vocab_size) "
            "are those of the checkpoint."
        )
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        # Devices that hold the same part share one read.
        key = tuple((piece.start, piece.stop) for piece in index)
        if key not in parts:
            parts[key] = np.asarray(read_part(index)).astype(wanted.dtype)
        return parts[key]

    try:
        if wanted.sharding is None:
            return jax.numpy.asarray(part((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, wanted.sharding, part)
    except ValueError as error:
        raise _damaged(name, folder, error) from error


def _reader(leaf: Any) -> tuple[tuple[int, ...], Callable[[tuple[slice, ...]], Any]]:
    """Returns the shape, and a function that reads a part."""
    if isinstance(leaf, np.ndarray):
        _check_floating(leaf.dtype)
        return leaf.shape, lambda index: leaf[index]
    import tensorstore

    # Without `fill_missing_data_reads: False`, a lost file of an array would read as zeros.
    spec = {**leaf, "fill_missing_data_reads": False}
    store = tensorstore.open(spec, open=True, read=True).result()
    _check_floating(store.dtype.numpy_dtype)
    return tuple(store.shape), lambda index: store[index].read().result()


def _check_floating(dtype: np.dtype) -> None:
    # T5X before version 3 stored the bits of bfloat16 as uint16, which are no numbers.
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise ValueError(f"its values must be floating-point numbers; they are {dtype}")


def _damaged(name: str, folder: epath.Path, error: Exception) -> ValueError:
    return ValueError(f"{name} could not be read from {folder}: {error}. {DAMAGED}")
