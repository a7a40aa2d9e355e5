"""LoRA: a frozen model with small trained matrices beside its products.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685): y = x W + alpha / rank * (x A) B, with A random
and B zero at the start, so that training begins at the base model exactly. W is frozen.

The parameters of such a student are two trees: `adapters`, which are trained, have optimizer state
and are saved, and `base`, which is restored at every start and is none of these. Functions of the
model take them joined; whoever trains or saves splits them.
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
"""All products of the attention and of the feed-forward blocks."""


@dataclasses.dataclass(frozen=True)
class LoRA(ModelWrapper):
    """A frozen model and its adapters; a `LanguageModel`.

    Adapters are float32 and are used in the compute dtype of the product that they are added to.

    Attributes:
      model: the base.
      rank: columns of A and rows of B.
      alpha: the adapters' sum counts alpha / rank.
      targets: which products have adapters, by the end of their path in the parameter tree:
        'query', 'wi*', 'self_attention/value', 'layers_0/mlp/wo'. `*` stands for any letters. The
        output layer can have none.
      base_dtype: that the base is kept in, 'bfloat16' or 'float32'.

    Raises:
      ValueError: rank, alpha or base_dtype is out of its range, or a target names no product.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_TARGETS
    base_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        # A list, as gin may give it, could not be hashed.
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        _check_settings(self)

    @functools.cached_property
    def kernels(self) -> dict[str, tuple[tuple[int, ...], jax.sharding.PartitionSpec]]:
        """Each product with adapters: its path to the kernel's shape and logical axes.

        Of stacked layers these have one axis more, the first.
        """
        candidates = products(self.model)
        return {
            path: entry
            for path, entry in candidates.items()
            if any(_names(target, path) for target in self.targets)
        }

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied by."""
        return self.alpha / self.rank

    @property
    def vocab_size(self) -> int:
        """That of the base."""
        return self.model.vocab_size

    def inner(self, params: Params) -> Params:
        """The base."""
        return params.get(_BASE, params)

    def init_adapters(self, key: Key[Array, ""]) -> Params:
        """A uniform in +-1/sqrt(its inputs), as PEFT has it, and B zero; float32."""
        adapters = {}
        for path, ((*depth, inputs, outputs), _) in self.kernels.items():
            bound = 1.0 / math.sqrt(inputs)

            def random(name: str, inputs: int = inputs, bound: float = bound) -> Array:
                # Keys by name: a target more or less leaves the others as they are.
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
        """Makes adapters, and a random base of its dtype; jit-able."""
        base = self.model.init(key)
        base = jax.tree.map(lambda leaf: leaf.astype(self.base_dtype), base)
        return join(self.init_adapters(key), base)

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters, without allocating them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Logical axis names: A lies as the kernel's inputs do, B as its outputs."""
        spec = jax.sharding.PartitionSpec
        adapters = {
            path: {A: spec(*axes[:-1], None), B: spec(*axes[:-2], None, axes[-1])}
            for path, (_, axes) in self.kernels.items()
        }
        nested = traverse_util.unflatten_dict(adapters, sep="/")
        return join(nested, self.model.logical_axes())

    def merge(self, params: Params) -> Params:
        """The base's parameters with the adapters added, float32 where there are any.

        W + alpha / rank * A B: the base model computes with them what this one does.
        """
        pairs = pairs_of(params[_ADAPTERS])
        flat = traverse_util.flatten_dict(params[_BASE], sep="/")
        for path, (a, b) in pairs.items():
            kernel = flat[f"{path}/kernel"].astype(jnp.float32)
            flat[f"{path}/kernel"] = kernel + self.scale * jnp.matmul(a, b, precision="highest")
        return traverse_util.unflatten_dict(flat, sep="/")

    def tracing(self, params: Params) -> Any:
        """While a function of the base is traced: the adapters are added to its products."""
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
    """Parameters as a model takes them, from what is trained and what is frozen, if anything is."""
    return trained if frozen is None else {_ADAPTERS: trained, _BASE: frozen}


def split(model: LanguageModel, params: PyTree[Any]) -> tuple[PyTree[Any], PyTree[Any] | None]:
    """What of a model's parameters is trained, and what is frozen; None where nothing is.

    Args:
      model: any.
      params: its parameters, or a tree like them: of shapes, of shardings.
    """
    if isinstance(model, RestrictedVocabulary):
        model = model.model
    if isinstance(model, LoRA):
        return params[_ADAPTERS], params[_BASE]
    return params, None


def init_trained(model: LanguageModel, key: Key[Array, ""]) -> Params:
    """Random parameters of what is trained: all of a model, or its adapters; jit-able."""
    return model.init_adapters(key) if isinstance(model, LoRA) else model.init(key)


def has_adapters(model: LanguageModel | None) -> bool:
    """Whether it is a base with adapters."""
    return isinstance(model, LoRA)


def base_of(model: LanguageModel) -> LanguageModel:
    """The model without adapters; itself where it has none."""
    return model.model if isinstance(model, LoRA) else model


def are_adapters(names: Iterable[str]) -> bool:
    """Whether parameters of these names, such as 'layers_0/mlp/wo/lora_a', are adapters."""
    return any(name.rpartition("/")[2] == A for name in names)


def fingerprint(params: Params) -> str:
    """A digest of parameters by which a base is known again, on any mesh.

    Of each array, the sum of its bits as whole numbers, which is exact in any order. Layers count
    one by one, however they lie.
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
    # Weighed by place, so that rows in another order are another model.
    place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, 0) if leaf.ndim else jnp.uint32(0)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def pairs_of(adapters: Params) -> dict[str, tuple[Array, Array]]:
    """Path of each product to its A and B."""
    flat = traverse_util.flatten_dict(adapters, sep="/")
    paths = [name.removesuffix(f"/{A}") for name in flat if name.endswith(f"/{A}")]
    return {path: (flat[f"{path}/{A}"], flat[f"{path}/{B}"]) for path in paths}


@functools.lru_cache(maxsize=64)  # Asked again by every equal model; it traces the model.
def products(
    model: LanguageModel,
) -> dict[str, tuple[tuple[int, ...], jax.sharding.PartitionSpec]]:
    """Every product of a model but that of the output layer, which losses make by themselves.

    The path of each to its kernel's shape and logical axes.
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
    """Whether a target's parts match the last parts of a path."""
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
