"""Partition of the arrays of a training state, derived from the shardings of its parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax.common.array_types import PyTree
from gkd_jax.models import stacking


def state_specs(
    abstract_state: PyTree[Any], param_shardings: PyTree[NamedSharding]
) -> PyTree[PartitionSpec]:
    """Returns the partition of each array of a training state.

    Arrays with the shape of a parameter (the parameter itself, moments, averages) are partitioned
    like this parameter. Adafactor's row and column statistics lack one axis of the parameter; the
    remaining axes are partitioned like the same axes of the parameter. All other arrays are
    replicated.

    Args:
      abstract_state: shapes of the state, with the parameters in its attribute or entry `params`.
        An array that the optimizer keeps for a parameter is recognized by its path, which ends in
        the path of the parameter.
      param_shardings: sharding of each parameter.
    """
    params = abstract_state["params"] if isinstance(abstract_state, dict) else abstract_state.params
    shardings = jax.tree_util.tree_leaves(param_shardings)
    by_path = {
        _names(path): (param.shape, sharding.spec)
        for (path, param), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), shardings, strict=True
        )
    }

    def spec_of(path: Any, array: Any) -> PartitionSpec:
        names = _names(path)
        for start in range(len(names)):
            if names[start:] in by_path:
                shape, spec = by_path[names[start:]]
                # If layers are stacked, the first axis enumerates the layers. The other axes are
                # partitioned like the axes of a separate layer.
                depth = int(stacking.STACKED in names[start:])
                of_layer = _spec_like(
                    shape[depth:], spec[depth:], array.shape[depth:], names[:start]
                )
                return PartitionSpec(*spec[:depth], *of_layer)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec_of, abstract_state)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _spec_like(
    shape: tuple[int, ...],
    spec: Sequence[str | None],
    state_shape: tuple[int, ...],
    container: tuple[str, ...],
) -> tuple[str | None, ...]:
    """Returns the partition of an array that the optimizer keeps for one parameter.

    Args:
      shape: shape of the parameter.
      spec: partition of the parameter.
      state_shape: shape of the optimizer's array.
      container: path, as names, of the optimizer's tree that contains the array. For Adafactor's
        statistics, it contains 'v_row' or 'v_col'.
    """
    full = (*spec, *(None,) * (len(shape) - len(spec)))
    if state_shape == shape:
        return full
    # Adafactor factors the two largest axes: `v_row` lacks the largest axis, and `v_col` lacks the
    # second largest. Axes of equal size are in the order of `np.argsort`. For a square parameter
    # `v_row` and `v_col` have the same shape, so only the name shows which axis is missing.
    dropped = {"v_row": -1, "v_col": -2}
    for name in container:
        if name in dropped and len(shape) > 1:
            axis = int(np.argsort(shape)[dropped[name]])
            if state_shape == shape[:axis] + shape[axis + 1 :]:
                return full[:axis] + full[axis + 1 :]
    return ()  # Placeholders of shape (1,) and arrays of unknown kinds are replicated.
