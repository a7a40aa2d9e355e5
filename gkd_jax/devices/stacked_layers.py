"""Converts shapes and arrays, with their shardings, between separate and stacked layers."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax.common.array_types import Params, PyTree
from gkd_jax.models import stacking


def layer_shape(stacked: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape and sharding of one layer of a stacked parameter."""
    sharding = stacked.sharding
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=sharding)


def stacked_shape(*layers: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape and sharding of stacked layers. The inverse of `layer_shape`."""
    layer, sharding = layers[0], layers[0].sharding
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.ShapeDtypeStruct((len(layers), *layer.shape), layer.dtype, sharding=sharding)


def stack_params(params: Params, wanted: PyTree[jax.ShapeDtypeStruct]) -> Params:
    """Stacks the parameters of layers and gives the results the shardings of `wanted`.

    Parameters are stacked one at a time. The separate arrays of a parameter are deleted before the
    next one is stacked. At any time, the devices thus hold at most one parameter in both forms.

    Args:
      params: parameters of separate layers, whose arrays are deleted.
      wanted: shapes and shardings of the stacked parameters.
    """

    def join(*layers: jax.Array) -> jax.Array:
        stacked = jax.jit(lambda *arrays: jax.numpy.stack(arrays))(*layers)
        stacked.block_until_ready()
        for layer in layers:
            layer.delete()
        return stacked

    def place(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return array if like.sharding is None else jax.device_put(array, like.sharding)

    return jax.tree.map(place, stacking.stack(params, join), wanted)
