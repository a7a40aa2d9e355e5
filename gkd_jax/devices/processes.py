"""Communication between the processes (hosts) of a run."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gkd_jax.common.array_types import PyTree


def fetch_to_host(tree: PyTree[Any]) -> PyTree[np.ndarray]:
    """Copies entire global arrays to every process as NumPy arrays.

    All processes must call this function.
    """
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, jax.device_get(tree))


def process_zero_decides(decide: Callable[[], int]) -> int:
    """Calls `decide` on process 0 and returns its result on all processes.

    Use it for decisions that depend on the contents of a directory, because processes that read a
    directory at different times may see different files. All processes must call this function.

    Args:
      decide: function that returns a nonnegative integer.

    Raises:
      OSError, ValueError: `decide` raised this error on process 0. The other processes raise a
        ValueError.
    """
    if jax.process_count() == 1:
        return decide()
    result, error = -1, None
    if jax.process_index() == 0:
        try:
            result = int(decide())
        except (OSError, ValueError) as caught:
            error = caught
    result = int(multihost_utils.broadcast_one_to_all(np.int32(result)))
    if error is not None:
        raise error
    if result < 0:
        raise ValueError("process 0 cannot go on with the files of this run: see its log")
    return result
