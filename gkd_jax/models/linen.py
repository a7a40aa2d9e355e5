"""What the families of models share: pure functions of a Linen module and its parameters."""

import abc
import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gkd_jax.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.models import stacking

Layers = Sequence[nn.Module] | nn.Module
"""The layers of a network, or one that stands for all where their parameters are stacked."""

Index = int | Int[Array, ""]
"""Number of a layer; traced where layers are stacked."""

Body = Callable[[Any, Any, Index], tuple[Any, Any]]

# Which activations of a layer the backward pass finds, rather than computes again; by T5X's names.
_REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

_layer: contextvars.ContextVar[Index | None] = contextvars.ContextVar("layer", default=None)


def make_layers(make: Callable[[], nn.Module], number: int, *, stacked: bool) -> Layers:
    """The layers of a network, as `run_layers` takes them."""
    return make() if stacked else [make() for _ in range(number)]


def run_layers(
    layers: Layers, body: Body, carry: Any, *, num_layers: int, remat_policy: str = "none"
) -> tuple[Any, Any]:
    """Runs through layers: one after the other, or as one loop where they are stacked.

    Args:
      layers: in order, or the one that stands for all.
      body: `(layer, carry, number of the layer)` to the new carry and an output.
      carry: the first layer's.
      num_layers: how many there are.
      remat_policy: of each layer, as the configurations have it.

    Returns:
      The last carry; and the outputs, in a tuple, or stacked along a new second axis.
    """

    def rematerialised(fn: Callable[..., Any]) -> Callable[..., Any]:
        if remat_policy == "none":
            return fn
        # Within a loop the compiler cannot undo it, and need not be kept from it.
        is_loop = isinstance(layers, nn.Module)
        return nn.remat(fn, policy=_REMAT_POLICIES[remat_policy], prevent_cse=not is_loop)

    if isinstance(layers, nn.Module):

        def one(layer: nn.Module, carry: Any, number: Index) -> tuple[Any, Any]:
            with _at_layer(number):
                return body(layer, carry, number)

        loop = nn.scan(
            rematerialised(one),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=num_layers,
            out_axes=1,
        )
        return loop(layers, carry, jnp.arange(num_layers))
    outputs = []
    for number, layer in enumerate(layers):
        numbered = rematerialised(lambda layer, carry, n=number: body(layer, carry, n))
        carry, output = numbered(layer, carry)
        outputs.append(output)
    return carry, tuple(outputs)


@contextlib.contextmanager
def _at_layer(number: Index) -> Iterator[None]:
    token = _layer.set(number)
    try:
        yield
    finally:
        _layer.reset(token)


def of_this_layer(leaf: Array, ndim: int) -> Array:
    """Within a loop over stacked layers, this layer's part of an array that is not scanned.

    Args:
      leaf: with a first axis for layers, or without it, and then it is returned.
      ndim: axes of a layer's part.
    """
    number = _layer.get()
    if leaf.ndim == ndim or number is None:
        return leaf
    return lax.dynamic_index_in_dim(leaf, number, keepdims=False)


def take_layer(outputs: Any, number: Index) -> Any:
    """A layer's entry of what `run_layers` returned as outputs."""
    if isinstance(number, int):
        return outputs[number]
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, number, axis=1, keepdims=False), outputs
    )


def extend_cache(cache: Any, new: Any, number: Index, slot: Int[Array, ""]) -> tuple[Any, Any]:
    """Puts keys and values of a decode step at a slot of a cache.

    Args:
      cache: of all layers, as `run_layers` returns outputs: [B, H, L, K] each, or stacked.
      new: this layer's keys and values of the tokens that are fed, [B, H, 1, K].
      number: of the layer.
      slot: where they lie on axis L.

    Returns:
      The keys and values of this layer, and the cache.
    """
    if isinstance(number, int):
        layer = jax.tree.map(
            lambda old, x: lax.dynamic_update_slice_in_dim(old, x, slot, axis=2),
            cache[number],
            new,
        )
        return layer, (*cache[:number], layer, *cache[number + 1 :])
    # In place: only the slot is written, and the layer is read where it lies.
    cache = jax.tree.map(
        lambda old, x: lax.dynamic_update_slice(old, x[:, None], (0, number, 0, slot, 0)),
        cache,
        new,
    )
    return take_layer(cache, number), cache


# A run asks a dozen times, and a deep model takes seconds to trace.
@functools.lru_cache(maxsize=16)
def _abstract_boxed_params(model: "LinenModel") -> PyTree:
    return jax.eval_shape(model._boxed_params, jax.random.key(0))


class LinenModel(abc.ABC):
    """A Linen module behind the functions of a `LanguageModel`; subclasses are frozen dataclasses.

    Attributes:
      config: sizes and variant, with `vocab_size`, `emb_dim` and `scan_layers`.
    """

    config: Any
    # Where the cache has the first output token.
    _first_slot: ClassVar[int] = 0

    @property
    @abc.abstractmethod
    def module(self) -> nn.Module:
        """The Linen module."""

    @abc.abstractmethod
    def _boxed_params(self, key: Key[Array, ""]) -> PyTree:
        """Random parameters, layers unstacked, in the boxes that hold their logical axes."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding of the vocabulary included."""
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of hidden states."""
        return self.config.emb_dim

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes float32 parameters; jit-able."""
        params = nn.meta.unbox(self._boxed_params(key))
        # The same numbers in both forms.
        return stacking.stack(params) if self.config.scan_layers else params

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters, without allocating them."""
        params = nn.meta.unbox(_abstract_boxed_params(self))
        return jax.eval_shape(stacking.stack, params) if self.config.scan_layers else params

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Logical axis names of each parameter, in T5X's words."""
        axes = nn.get_partition_spec(_abstract_boxed_params(self))
        if not self.config.scan_layers:
            return axes

        def stacked(*of_layers: jax.sharding.PartitionSpec) -> jax.sharding.PartitionSpec:
            return jax.sharding.PartitionSpec(stacking.STACKED, *of_layers[0])

        return stacking.stack(axes, stacked)

    def prefill(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        max_length: int,
    ) -> tuple[Float[Array, "B D"], Any]:
        """Reads the prompts in one pass, and T5's decoder its start token.

        Args:
          params: parameters.
          inputs: prompt tokens, padded anywhere.
          inputs_mask: True on real tokens, of which a decoder-only model's rows have one at least.
          max_length: output tokens that the state has room for. Of T5 the last of them, which
            predicts nothing that is wanted, has no slot of its own.

        Returns:
          Hidden states of the first output position, and the state.

        Raises:
          ValueError: `max_length` is below 1.
        """
        check_max_length(max_length)
        module: Any = type(self.module)
        return cast(
            tuple[Array, Any],
            self._apply(params, module.prefill, inputs, inputs_mask, max_length),
        )

    def decode_step(
        self,
        params: Params,
        state: Any,
        tokens: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], Any]:
        """Feeds the output tokens at position `index`; returns hidden states for the next.

        Args:
          params: parameters.
          state: from `prefill` or the step before.
          tokens: output tokens at position `index`.
          index: position in the output, from 0 to max_length - 2; may be traced.

        Returns:
          Hidden states of output position `index + 1`, and the state.
        """
        module: Any = type(self.module)
        slot = jnp.asarray(index, jnp.int32)
        if self._first_slot:
            slot = slot + self._first_slot
        return cast(tuple[Array, Any], self._apply(params, module.step, state, tokens, slot))

    def _apply(
        self,
        params: Params,
        method: Callable[..., Any],
        *arguments: Any,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Any:
        # The layers drop exactly when there is a key of this name.
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply({"params": params}, *arguments, rngs=rngs, method=method)


def check_max_length(max_length: int) -> None:
    """Refuses a decoding state without room.

    Raises:
      ValueError: the length is below 1.
    """
    if max_length < 1:
        raise ValueError(
            f"max_length must be at least 1; got {max_length}. Set it to the longest output "
            "to generate."
        )
