"""How the arrays of a training state are partitioned, derived from its parameters' shardings."""

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
    like it. Adafactor's row and column statistics are partitioned like the axes that they keep.
    All other arrays are replicated.

    Args:
      abstract_state: shapes. The parameters are its attribute or entry `params`, and the trees of
        the optimizer repeat the paths of the parameters.
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
                # Each of several stacked layers has a state like that of a separate parameter.
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
    """Returns the partition of an optimizer's array that belongs to a parameter.

    Args:
      shape: shape of the parameter.
      spec: partition of the parameter.
      state_shape: shape of the optimizer's array.
      container: names of the path to the optimizer's copy of the parameter tree.
    """
    full = (*spec, *(None,) * (len(shape) - len(spec)))
    if state_shape == shape:
        return full
    # Adafactor factors the two largest axes: rows drop the largest, columns the second largest,
    # with NumPy's order among equals. For a square parameter only the names tell them apart.
    dropped = {"v_row": -1, "v_col": -2}
    for name in container:
        if name in dropped and len(shape) > 1:
            axis = int(np.argsort(shape)[dropped[name]])
            if state_shape == shape[:axis] + shape[axis + 1 :]:
                return full[:axis] + full[axis + 1 :]
    return ()  # A placeholder of shape (1,), or a state that this module does not know.
