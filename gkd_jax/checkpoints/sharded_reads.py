"""Reads arrays of T5X and Hugging Face checkpoints with the shardings that a model requires."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

DAMAGED = "The file is damaged or was not copied completely: copy the checkpoint again."


def read_sharded(
    name: str, stored: Any, wanted: jax.ShapeDtypeStruct, folder: epath.Path
) -> jax.Array:
    """Reads one parameter and converts it to the requested dtype and sharding.

    Each host reads only the slices that its devices hold.

    Args:
      name: name of the parameter, for error messages.
      stored: a NumPy array, which may be memory-mapped, or a TensorStore spec.
      wanted: shape, dtype and sharding; an array without sharding is placed on the default device.
      folder: the checkpoint, for error messages.

    Raises:
      ValueError: the stored array has another shape, is not floating-point, or cannot be read.
    """
    try:
        shape, read_slice = _open(stored)
    except ValueError as error:
        raise _damaged(name, folder, error) from error
    if shape != wanted.shape:
        raise ValueError(
            f"{name} must have the shape of the model, {wanted.shape}; {folder} has {shape}. "
            "Check that the model's sizes (emb_dim, num_heads, head_dim, mlp_dim, vocab_size) "
            "are those of the checkpoint."
        )
    slices: dict[tuple, np.ndarray] = {}

    def read_once(index: Any) -> np.ndarray:
        # Devices that hold the same slice share one read.
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in slices:
            slices[key] = np.asarray(read_slice(index)).astype(wanted.dtype)
        return slices[key]

    try:
        if wanted.sharding is None:
            return jax.numpy.asarray(read_once((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, wanted.sharding, read_once)
    except ValueError as error:
        raise _damaged(name, folder, error) from error


def _open(stored: Any) -> tuple[tuple[int, ...], Callable[[tuple[slice, ...]], Any]]:
    """Returns the shape of an array and a function that reads a slice of it."""
    if isinstance(stored, np.ndarray):
        _check_floating(stored.dtype)
        return stored.shape, lambda index: stored[index]
    import tensorstore

    # Without `fill_missing_data_reads: False`, a lost file of an array would be read as zeros.
    spec = {**stored, "fill_missing_data_reads": False}
    array = tensorstore.open(spec, open=True, read=True).result()
    _check_floating(array.dtype.numpy_dtype)
    return tuple(array.shape), lambda index: array[index].read().result()


def _check_floating(dtype: np.dtype) -> None:
    # T5X before version 3 stored bfloat16 as uint16 bit patterns, which are not supported.
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise ValueError(f"its values must be floating-point numbers; they are {dtype}")


def _damaged(name: str, folder: epath.Path, error: Exception) -> ValueError:
    return ValueError(f"{name} could not be read from {folder}: {error}. {DAMAGED}")
