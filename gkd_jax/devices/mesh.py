"""Device meshes of one slice, or of several slices connected by a slower network."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gkd_jax.common.mesh_axes import MeshAxes

_AXES = ("data", "model")
_ROW_AXES = ("slice", "data")


def axes_of(mesh: Mesh) -> MeshAxes:
    """Returns which axes split the rows of a batch, and which axis splits wide layers.

    Rows are split over 'slice' and 'data', and layers over 'model'. Axes that the mesh lacks are
    left out.
    """
    rows, width = (
        tuple(axis for axis in axes if axis in mesh.axis_names) for axes in (_ROW_AXES, ("model",))
    )
    return MeshAxes(rows=rows, width=width)


def make_mesh(
    devices: Sequence[jax.Device], data: int, model: int, *, num_slices: int | None
) -> Mesh:
    """Builds a mesh of data * model devices with the axes 'data' and 'model'.

    With several slices, the mesh has 'slice' as an additional first axis. The size of 'data' is
    then the number of model replicas per slice.

    Args:
      devices: the devices of the mesh.
      data: number of model replicas, over all slices.
      model: number of devices that share one model replica. They are adjacent in the mesh.
      num_slices: number of slices. None uses the slices that the devices report. 1 builds a mesh
        without the axis 'slice', in which 'data' covers the replicas of all slices.

    Raises:
      ValueError: the devices report another number of slices, or a model replica would span
        several slices.
    """
    real = len({getattr(device, "slice_index", 0) for device in devices})
    wanted = _checked(num_slices, real, data)
    # With AxisType.Auto, the compiler chooses the sharding of arrays without a sharding constraint.
    auto = (AxisType.Auto,)
    if real == wanted == 1:
        # jax.make_mesh orders devices by the topology of the machine.
        return jax.make_mesh((data, model), _AXES, axis_types=auto * 2, devices=devices)
    array = np.asarray(devices).reshape(data, model)
    if real > 1:
        # Orders the devices of each slice by the topology of the slice.
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
    count = max(real, wanted)
    if data % count:
        raise ValueError(
            "Partitioner.data_parallelism must be a multiple of the number of slices, since a "
            f"copy of a model lies within one; got {data} and {count}. Set "
            "Partitioner.model_parallelism to a divisor of the devices of a slice, and leave "
            "data_parallelism at None."
        )
    return wanted
