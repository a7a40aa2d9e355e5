"""Int8 weights for teachers: integers from -127 to 127, with a float32 scale for each column.

    W_ij ≈ s_j q_ij with s_j = max_i |W_ij| / 127, so y_j = s_j (x q)_j

Activations are not quantised. Products are computed in the model's dtype; integers up to 127 are
exact even in bfloat16. Embeddings, norms and the output layer are not quantised. (Losses read the
output layer directly.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from gkd_jax.common.array_types import Array, Float, Int, Key, Params, PyTree
from gkd_jax.models import layers
from gkd_jax.models.layer_loops import slice_of_layer
from gkd_jax.models.lora import products
from gkd_jax.models.wrapper import ModelWrapper

_LARGEST = 127


@dataclasses.dataclass(frozen=True)
class Int8(ModelWrapper):
    """A model whose matrix products have int8 weights; a `LanguageModel` for inference.

    The parameters consist of two trees. `weights` are the model's parameters, with int8 kernels.
    `scales` maps the path of each int8 kernel to its float32 scales.

    Attributes:
      model: the model that is quantised.
    """

    @property
    def vocab_size(self) -> int:
        """Size of the output layer."""
        return self.model.vocab_size

    def inner(self, params: Params) -> Params:
        """Returns the model's parameters with int8 kernels."""
        return params.get("weights", params)

    def quantise(self, params: Params) -> Params:
        """Quantises the model's parameters; can be jitted."""
        flat = dict(traverse_util.flatten_dict(params, sep="/"))
        scales = {}
        for path in products(self.model):
            flat[f"{path}/kernel"], scales[path] = quantise_kernel(flat[f"{path}/kernel"])
        return {"weights": traverse_util.unflatten_dict(flat, sep="/"), "scales": scales}

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random quantised parameters; can be jitted."""
        return self.quantise(self.model.init(key))

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the parameters."""
        return jax.eval_shape(self.quantise, self.model.abstract_params())

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Returns the logical axis names. Scales have the name of their kernel's output axis."""
        spec = jax.sharding.PartitionSpec
        scales = {
            path: spec(*axes[:-2], axes[-1]) for path, (_, axes) in products(self.model).items()
        }
        return {"weights": self.model.logical_axes(), "scales": scales}

    def tracing(self, params: Params) -> Any:
        """Returns a context in which functions of the model, when traced, apply the scales."""
        scales = params["scales"]

        def scale(next_fn: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if not isinstance(module, layers.Dense) or context.method_name != "__call__":
                return next_fn(*args, **kwargs)
            column_scales = scales.get("/".join(module.path))
            if column_scales is None:
                return next_fn(*args, **kwargs)
            x, dtype = args[0], module.dtype
            y = jnp.dot(
                x.astype(dtype),
                module.get_variable("params", "kernel").astype(dtype),
                preferred_element_type=jnp.float32,
            )
            column_scales = slice_of_layer(column_scales, 1)
            y = y * jnp.expand_dims(column_scales, tuple(range(y.ndim - 1)))
            if module.use_bias:
                bias: Array = module.get_variable("params", "bias").astype(jnp.float32)
                y = y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))
            return y.astype(dtype)

        return nn.intercept_methods(scale)


def quantise_kernel(
    kernel: Float[Array, "*n I O"],
) -> tuple[Int[Array, "*n I O"], Float[Array, "*n O"]]:
    """Rounds a kernel to int8.

    Returns:
      The integers, and a float32 scale for each column. The scale of a column of zeros is 1.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=-2)
    scales = jnp.where(largest == 0, 1.0, largest / _LARGEST)
    return jnp.round(kernel / scales[..., None, :]).astype(jnp.int8), scales
