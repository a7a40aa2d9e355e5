"""Meshes of devices: one slice, or several that a slower network joins."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gkd_jax.common.mesh_axes import MeshAxes

_AXES = ("data", "model")
_ROW_AXES = ("slice", "data")


def axes_of(mesh: Mesh) -> MeshAxes:
    """Returns the roles of a mesh's axes, whoever made it: 'slice', 'data' and 'model'."""
    rows, width = (
        tuple(axis for axis in axes if axis in mesh.axis_names) for axes in (_ROW_AXES, ("model",))
    )
    return MeshAxes(rows=rows, width=width)


def make_mesh(
    devices: Sequence[jax.Device], data: int, model: int, *, num_slices: int | None
) -> Mesh:
    """Lays data * model devices out along 'data' and 'model', and 'slice' where there are several.

    With several slices, 'slice' is the first axis and 'data' is what is left of it within one.

    Args:
      devices: all of the mesh.
      data: how many share a batch.
      model: how many share a copy of a model; neighbours.
      num_slices: how many parts the devices have; None for what they say, 1 for a mesh without
        'slice', in which the slices follow each other along 'data'.

    Raises:
      ValueError: the devices have other slices, or a copy of a model would not lie within one.
    """
    real = len({getattr(device, "slice_index", 0) for device in devices})
    wanted = _checked(num_slices, real, data)
    # Auto: the compiler lays out what is not constrained.
    auto = (AxisType.Auto,)
    if real == wanted == 1:
        # Orders devices by the machine's topology.
        return jax.make_mesh((data, model), _AXES, axis_types=auto * 2, devices=devices)
    array = np.asarray(devices).reshape(data, model)
    if real > 1:
        # Within each slice as make_mesh does.
        array = mesh_utils.create_hybrid_device_mesh(
            (data // real, model), (real, 1), devices, allow_split_physical_axes=True
        )
    if wanted == 1:
        return Mesh(array, _AXES, axis_types=auto * 2)
    in_slices = array.reshape(wanted, data // wanted, model)
    return Mesh(in_slices, ("slice", *_AXES), axis_types=auto * 3)


def _checked(num_slices: int | None, real: int, data: int) -> int:
    wanted = real if num_slices is None else num_slices
    if real > 1 and wanted not in (1, real):
        raise ValueError(
            "Partitioner.num_slices must be 1 or the number of slices that the devices have; got "
            f"{wanted} and {real}. Leave it at None to take theirs."
        )
    parts = max(real, wanted)
    if data % parts:
        raise ValueError(
            "Partitioner.data_parallelism must be a multiple of the number of slices, since a "
            f"copy of a model lies within one; got {data} and {parts}. Set "
            "Partitioner.model_parallelism to a divisor of the devices of a slice, and leave "
            "data_parallelism at None."
        )
    return wanted
