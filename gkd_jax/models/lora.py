"""LoRA: a frozen base model with small trained adapters on its matrix products.

"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685:

    y = x W + alpha / rank * (x A) B

W is frozen. A is initialised at random and B to zero, so that training starts exactly at the base
model.

The parameters consist of two trees. `adapters` are trained, have optimizer state and are saved in
checkpoints. `base` is not saved; it is restored whenever a run starts. `join` combines both trees
into the parameters that the model's functions take. `split` separates these parameters into both
trees, for training and checkpointing.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from gkd_jax.common.array_types import Array, Key, Params, PyTree
from gkd_jax.models import layers, stacking
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.layer_loops import slice_of_layer
from gkd_jax.models.wrapper import ModelWrapper, RestrictedVocabulary

_ADAPTERS, _BASE = "adapters", "base"
A, B = "lora_a", "lora_b"
ALL_TARGETS = ("query", "key", "value", "out", "wi*", "wo")
"""All matrix products of the attention and the feed-forward blocks."""


@dataclasses.dataclass(frozen=True)
class LoRA(ModelWrapper):
    """A frozen base model and its adapters; a `LanguageModel`.

    Adapters are stored in float32 and used in the dtype of the product that they are added to.

    Attributes:
      model: the base model.
      rank: columns of A and rows of B.
      alpha: scale of the adapters: their output is multiplied by alpha / rank.
      targets: the matrix products that have adapters. Each is given by the last parts of its path
        in the parameter tree, such as 'query', 'wi*', 'self_attention/value' or
        'layers_0/mlp/wo'. `*` matches any characters. The output layer cannot have adapters.
      base_dtype: dtype of the base's parameters, 'bfloat16' or 'float32'.

    Raises:
      ValueError: rank, alpha or base_dtype is out of range, or a target matches no product.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_TARGETS
    base_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        # A gin file may give a list, which cannot be hashed.
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        _check_settings(self)

    @functools.cached_property
    def kernels(self) -> dict[str, tuple[tuple[int, ...], jax.sharding.PartitionSpec]]:
        """Maps the path of each product with adapters to its kernel's shape and logical axes.

        Kernels of stacked layers have the layers as an additional first axis.
        """
        candidates = products(self.model)
        return {
            path: entry
            for path, entry in candidates.items()
            if any(_names(target, path) for target in self.targets)
        }

    @property
    def scale(self) -> float:
        """Factor that the output of the adapters is multiplied by, alpha / rank."""
        return self.alpha / self.rank

    @property
    def vocab_size(self) -> int:
        """Size of the base model's output layer."""
        return self.model.vocab_size

    def inner(self, params: Params) -> Params:
        """Returns the base's parameters."""
        return params.get(_BASE, params)

    def init_adapters(self, key: Key[Array, ""]) -> Params:
        """Makes float32 adapters. As in PEFT, A is uniform in ±1/sqrt(inputs), and B is zero."""
        adapters = {}
        for path, ((*depth, inputs, outputs), _) in self.kernels.items():
            bound = 1.0 / math.sqrt(inputs)

            def random(name: str, inputs: int = inputs, bound: float = bound) -> Array:
                # The key depends only on the name of the product, so that the initial values do not
                # change with the choice of targets.
                own = jax.random.fold_in(key, zlib.crc32(name.encode()))
                return jax.random.uniform(own, (inputs, self.rank), jnp.float32, -bound, bound)

            if depth:
                names = stacking.names_of_layers(path, *depth)
                a = jnp.stack([random(name) for name in names])
            else:
                a = random(path)
            adapters[path] = {A: a, B: jnp.zeros((*depth, self.rank, outputs), jnp.float32)}
        return traverse_util.unflatten_dict(adapters, sep="/")

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes adapters, and a random base in `base_dtype`; can be jitted."""
        base = self.model.init(key)
        base = jax.tree.map(lambda leaf: leaf.astype(self.base_dtype), base)
        return join(self.init_adapters(key), base)

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the parameters without allocating them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Returns the logical axis names of the parameters.

        The input axis of A and the output axis of B have the names of these axes in the kernel.
        The rank axis of A and B has no name.
        """
        spec = jax.sharding.PartitionSpec
        adapters = {
            path: {A: spec(*axes[:-1], None), B: spec(*axes[:-2], None, axes[-1])}
            for path, (_, axes) in self.kernels.items()
        }
        nested = traverse_util.unflatten_dict(adapters, sep="/")
        return join(nested, self.model.logical_axes())

    def merge(self, params: Params) -> Params:
        """Merges the adapters into the base: W + alpha / rank * A B.

        With the merged parameters, the base model computes the same function as this model.

        Args:
          params: adapters and base.

        Returns:
          Parameters of the base model. Kernels that adapters were merged into are float32.
        """
        pairs = pairs_of(params[_ADAPTERS])
        flat = traverse_util.flatten_dict(params[_BASE], sep="/")
        for path, (a, b) in pairs.items():
            kernel = flat[f"{path}/kernel"].astype(jnp.float32)
            flat[f"{path}/kernel"] = kernel + self.scale * jnp.matmul(a, b, precision="highest")
        return traverse_util.unflatten_dict(flat, sep="/")

    def tracing(self, params: Params) -> Any:
        """Returns a context in which the base model's functions, when traced, apply adapters."""
        pairs = pairs_of(params[_ADAPTERS])

        def add(next_fn: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            y = next_fn(*args, **kwargs)
            if not isinstance(context.module, layers.Dense) or context.method_name != "__call__":
                return y
            pair = pairs.get("/".join(context.module.path))
            if pair is None:
                return y
            x = args[0].astype(y.dtype)
            a, b = (slice_of_layer(matrix, 2).astype(y.dtype) for matrix in pair)
            return y + self.scale * jnp.dot(jnp.dot(x, a), b)

        return nn.intercept_methods(add)


def join(trained: Params, frozen: Params | None) -> Params:
    """Joins trained and frozen parameters into the parameters that the model's functions take.

    If `frozen` is None, all parameters are trained, and `trained` is returned.
    """
    return trained if frozen is None else {_ADAPTERS: trained, _BASE: frozen}


def split(model: LanguageModel, params: PyTree[Any]) -> tuple[PyTree[Any], PyTree[Any] | None]:
    """Splits a model's parameters into trained and frozen ones. Inverse of `join`.

    Args:
      model: any model.
      params: its parameters, or a tree of the same structure, such as shapes or shardings.

    Returns:
      The trained and the frozen parameters. If all parameters are trained, the second is None.
    """
    if isinstance(model, RestrictedVocabulary):
        model = model.model
    if isinstance(model, LoRA):
        return params[_ADAPTERS], params[_BASE]
    return params, None


def init_trained(model: LanguageModel, key: Key[Array, ""]) -> Params:
    """Makes random trained parameters: the adapters, or all parameters if there are no adapters."""
    return model.init_adapters(key) if isinstance(model, LoRA) else model.init(key)


def has_adapters(model: LanguageModel | None) -> bool:
    """Returns whether the model has adapters."""
    return isinstance(model, LoRA)


def base_of(model: LanguageModel) -> LanguageModel:
    """Returns the base model of a LoRA. A model without adapters is returned unchanged."""
    return model.model if isinstance(model, LoRA) else model


def are_adapters(names: Iterable[str]) -> bool:
    """Returns whether any name belongs to an adapter, such as 'layers_0/mlp/wo/lora_a'."""
    return any(name.rpartition("/")[2] == A for name in names)


def fingerprint(params: Params) -> str:
    """Returns a digest that identifies the parameters of a base model.

    It is computed from a weighted sum of the bits of each array. The sum is over integers, so it is
    the same for any order of summation, and therefore on any mesh. Stacked layers have the same
    digest as separate layers.
    """
    params = stacking.unstack(params)
    digest = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(f"{path} {leaf.shape} {leaf.dtype} {int(_sum_of_bits(leaf))}".encode())
    return digest.hexdigest()


@jax.jit
def _sum_of_bits(leaf: Array) -> Array:
    width = 8 * leaf.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    # Weighted by row, so that the digest changes if rows are permuted.
    row = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, 0) if leaf.ndim else jnp.uint32(0)
    return jnp.sum(bits * (2 * row + 1), dtype=jnp.uint32)


def pairs_of(adapters: Params) -> dict[str, tuple[Array, Array]]:
    """Maps the path of each product with adapters to its A and B."""
    flat = traverse_util.flatten_dict(adapters, sep="/")
    paths = [name.removesuffix(f"/{A}") for name in flat if name.endswith(f"/{A}")]
    return {path: (flat[f"{path}/{A}"], flat[f"{path}/{B}"]) for path in paths}


@functools.lru_cache(maxsize=64)  # Cached because it traces the model and is called often.
def products(
    model: LanguageModel,
) -> dict[str, tuple[tuple[int, ...], jax.sharding.PartitionSpec]]:
    """Maps the path of every matrix product to its kernel's shape and logical axes.

    The output layer is excluded, since losses compute its product themselves.
    """
    shapes = traverse_util.flatten_dict(model.abstract_params(), sep="/")
    axes = traverse_util.flatten_dict(model.logical_axes(), sep="/")
    head = traverse_util.flatten_dict(model.head(model.abstract_params()), sep="/")
    return {
        name.removesuffix("/kernel"): (leaf.shape, axes[name])
        for name, leaf in shapes.items()
        if name.endswith("/kernel") and name not in head
    }


def _names(target: str, path: str) -> bool:
    """Returns whether a target, such as 'mlp/wi*', matches the last parts of a path."""
    wanted, parts = target.split("/"), path.split("/")
    ends = zip(reversed(parts), reversed(wanted), strict=False)
    return len(wanted) <= len(parts) and all(fnmatch.fnmatchcase(*pair) for pair in ends)


def _check_settings(lora: LoRA) -> None:
    if isinstance(lora.model, LoRA):
        raise ValueError("LoRA.model has adapters already; got a LoRA. Set it to the base model.")
    if isinstance(lora.targets, str) or not lora.targets:
        raise ValueError(
            f"LoRA.targets must be one or more names in a tuple; got {lora.targets!r}. Set it "
            f"(LORA_TARGETS) to e.g. {ALL_TARGETS}."
        )
    candidates = products(lora.model)
    for target in lora.targets:
        if not any(_names(target, path) for path in candidates):
            known = sorted({path.rpartition("/")[2] for path in candidates})
            raise ValueError(
                f"LoRA.targets names no product of the model: {target!r}. Set it (LORA_TARGETS) to "
                f"some of {', '.join(known)}, or to longer ends of paths such as "
                f"{min(candidates)!r}. The output layer can have no adapters."
            )
    rank, smallest = lora.rank, min(min(shape[-2:]) for shape, _ in lora.kernels.values())
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= smallest:
        raise ValueError(
            f"LoRA.rank must be a whole number from 1 to {smallest}, the smallest side of its "
            f"targets' kernels; got {rank!r}. Set it (LORA_RANK) to e.g. {min(16, smallest)}."
        )
    if not (isinstance(lora.alpha, (int, float)) and 0 < lora.alpha < math.inf):
        raise ValueError(
            f"LoRA.alpha must be a positive number; got {lora.alpha!r}. Set it (LORA_ALPHA) to "
            f"e.g. {2.0 * rank}, twice the rank."
        )
    if lora.base_dtype not in ("bfloat16", "float32"):
        raise ValueError(
            f"LoRA.base_dtype must be 'bfloat16' or 'float32'; got {lora.base_dtype!r}. Set it to "
            "one of them."
        )
