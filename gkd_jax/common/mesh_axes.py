"""Roles of the axes of the device mesh: which dimensions of arrays each axis splits.

The package `devices` defines the axes of a mesh and their roles. Some functions of packages that
cannot import `devices`, such as the fused loss, depend on how arrays are split. They read the roles
from this module while they are traced.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Names of mesh axes by role. An axis without a role splits no array.

    Attributes:
      rows: axes that the rows of a batch are split over.
      sequence: axes that the positions of a sequence are split over.
      width: axes that wide dimensions of parameters, such as the vocabulary, are split over.
    """

    rows: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    width: tuple[str, ...] = ()


_CURRENT: contextvars.ContextVar[MeshAxes] = contextvars.ContextVar("mesh_axes")


@contextlib.contextmanager
def use_mesh_axes(axes: MeshAxes) -> Iterator[None]:
    """Sets the roles of the axes of the mesh in use, for the functions called within.

    The mesh itself is not set by this function and must be set for the same calls. Roles are not
    part of the key under which JAX caches traced functions, so axes of the same name must always
    have the same roles.
    """
    token = _CURRENT.set(axes)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_mesh_axes() -> MeshAxes:
    """Returns the roles in use; by default no axis has a role."""
    return _CURRENT.get(MeshAxes())


def num_shards(shape: Mapping[str, int], axes: Iterable[str]) -> int:
    """Returns the number of shards of an array that is split over some axes of a mesh.

    Args:
      shape: size of each axis of the mesh; axes that are not in it have size 1.
      axes: names of axes.
    """
    return math.prod(shape.get(axis, 1) for axis in axes)
