"""What the families of models share: pure functions of a Linen module and its parameters."""

import abc
import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.models import stacking

Layers = Sequence[nn.Module] | nn.Module
"""The layers of a network, or one that stands for all where their parameters are stacked."""

Index = int | Int[Array, ""]
"""Number of a layer; traced where layers are stacked."""

Body = Callable[[Any, Any, Index, Any], tuple[Any, Any]]
"""`(layer, carry, number of the layer, kind of the layer)` to the new carry and an output."""

# Which activations of a layer the backward pass finds, rather than computes again; by T5X's names.
_REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The layer that is being traced within a loop over stacked layers.

    Attributes:
      number: of the layer; traced.
      body: number of the first layer that runs through this body of the loop; static.
    """

    number: Index
    body: int


_loop: contextvars.ContextVar[_Loop | None] = contextvars.ContextVar("loop", default=None)


def make_layers(make: Callable[[], nn.Module], number: int, *, stacked: bool) -> Layers:
    """Returns the layers of a network in the form that `run_layers` takes."""
    return make() if stacked else [make() for _ in range(number)]


def run_layers(
    layers: Layers, body: Body, carry: Any, *, kinds: Sequence[Any], remat_policy: str = "none"
) -> tuple[Any, Any]:
    """Runs all layers: one after the other, or in loops if their parameters are stacked.

    Kinds of stacked layers that repeat, such as five sliding windows and one full attention, are
    looped over period by period: a turn runs one body for each layer of the period. So each body
    has one static kind, and computes nothing for any other.

    Args:
      layers: in order, or the one module that stands for all.
      body: computes one layer, see `Body`.
      carry: input of the first layer.
      kinds: the kind of each layer, equal where layers compute the same function of their
        parameters; its length is the depth.
      remat_policy: applied to each layer; see the configurations.

    Returns:
      The last carry; and the outputs of all layers, in a tuple, or stacked along a new second axis.
    """
    if isinstance(layers, nn.Module):
        sections = stacking.sections(kinds)
        outputs = []
        for section in sections:
            loop = _make_loop(body, section, remat_policy, is_all=section.num_layers == len(kinds))
            numbers = section.start + section.period * jnp.arange(section.turns)
            carry, output = loop(layers, carry, numbers)
            outputs.append(output)
        # [B, turns, period, ...] of each section to [B, layers, ...].
        flat = [
            jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]), output)
            for output in outputs
        ]
        return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *flat)
    outputs = []
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        own = functools.partial(_call_body, body, number=number, kind=kind)
        carry, output = _rematerialised(own, remat_policy)(layer, carry)
        outputs.append(output)
    return carry, tuple(outputs)


def _call_body(
    body: Body, layer: nn.Module, carry: Any, *, number: Index, kind: Any
) -> tuple[Any, Any]:
    return body(layer, carry, number, kind)


def _rematerialised(
    fn: Callable[..., Any], remat_policy: str, *, prevent_cse: bool = True
) -> Callable[..., Any]:
    if remat_policy == "none":
        return fn
    return nn.remat(fn, policy=_REMAT_POLICIES[remat_policy], prevent_cse=prevent_cse)


def _make_loop(
    body: Body, section: stacking.Section, remat_policy: str, *, is_all: bool
) -> Callable[..., Any]:
    """Returns `(stacked layers, carry, number of each turn's first layer)` to carry and outputs."""
    # A layer a turn: the loop itself cuts the stack. Otherwise each body reads its layer where it
    # is stored, since cutting out sections or periods beforehand would copy the parameters.
    is_cut = is_all and section.period == 1

    def turn(stack: nn.Module, carry: Any, first: Index) -> tuple[Any, Any]:
        outputs = []
        for offset, kind in enumerate(section.kinds):

            def one(
                layer: nn.Module, carry: Any, number: Index, offset: int = offset, kind: Any = kind
            ) -> tuple[Any, Any]:
                with _within(_Loop(number, section.start + offset)):
                    return body(layer, carry, number, kind)

            # Reading is within what is computed again: layers that were read would be stored.
            # A loop's own backward pass needs no protection; one turn is compiled without a loop.
            own = _rematerialised(
                one if is_cut else _reading_own_layer(one), remat_policy,
                prevent_cse=section.turns == 1,
            )  # fmt: skip
            carry, output = own(stack, carry, first + offset)
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *outputs)

    how: dict[str, Any] = (
        {"variable_axes": {"params": 0}} if is_cut else {"variable_broadcast": "params"}
    )
    return nn.scan(
        turn,
        split_rngs={"params": True, "dropout": True},
        length=section.turns,
        out_axes=1,
        **how,
    )


def _reading_own_layer(one: Callable[..., Any]) -> Callable[..., Any]:
    """Gives `one` the parameters of its own layer in the place of the stack of all."""

    def read(stack: nn.Module, carry: Any, number: Index) -> tuple[Any, Any]:
        def take(params: PyTree) -> PyTree:
            return jax.tree.map(
                lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), params
            )

        return nn.map_variables(one, "params", trans_in_fn=take)(stack, carry, number)

    return read


@contextlib.contextmanager
def _within(loop: _Loop) -> Iterator[None]:
    token = _loop.set(loop)
    try:
        yield
    finally:
        _loop.reset(token)


def of_this_layer(leaf: Array, ndim: int) -> Array:
    """Returns the current layer's part of an array that a loop over stacked layers does not cut.

    Args:
      leaf: with a first axis for layers; or without it, and then it is returned unchanged.
      ndim: number of axes of one layer's part.
    """
    loop = _loop.get()
    if leaf.ndim == ndim or loop is None:
        return leaf
    return lax.dynamic_index_in_dim(leaf, loop.number, keepdims=False)


def key_of_this_layer(key: Key[Array, ""]) -> Key[Array, ""]:
    """Makes a layer's random key its own within a loop over stacked layers.

    Turns of a loop have different keys, but the bodies of one turn, and loops one after the other,
    have the same.
    """
    loop = _loop.get()
    return key if loop is None or loop.body == 0 else jax.random.fold_in(key, loop.body)


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
