"""Runs the layers of a network: one after the other, or in loops over stacked parameters."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gkd_jax.common.array_types import Array, Int, Key, PyTree
from gkd_jax.models import stacking

Layers = Sequence[nn.Module] | nn.Module
"""The layers of a network: a sequence of modules, or one module if parameters are stacked. This
module has the stacked parameters of all layers."""

Index = int | Int[Array, ""]
"""Index of a layer; traced if parameters are stacked."""

Body = Callable[[Any, Any, Index, Any], tuple[Any, Any]]
"""Function of `(layer, carry, index of the layer, kind of the layer)` that returns the new carry
and an output."""

# Rematerialisation policies, named as in T5X. Each policy selects the activations of a layer that
# are saved for the backward pass. All others are recomputed.
_REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The layer that is being traced within a loop over stacked layers.

    Attributes:
      number: index of the layer; traced.
      body: index of the layer that this body of the loop computes in the first turn; static.
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

    The kinds of stacked layers may repeat with a period, such as five layers with sliding windows
    and one with full attention. The loop then runs over periods: each turn runs one body for each
    layer of the period. The kind of each body is static, so a body computes only what its own kind
    needs.

    Args:
      layers: the layers in order, or one module with the stacked parameters of all layers.
      body: computes one layer, see `Body`.
      carry: carry that the first layer receives.
      kinds: the kind of each layer, with one entry per layer. Layers of the same kind compute the
        same function of their parameters.
      remat_policy: rematerialisation policy of each layer, see `DecoderConfig.remat_policy`.

    Returns:
      The last carry, and the outputs of all layers. The outputs are a tuple with one entry per
      layer, or, if parameters are stacked, arrays with the layers as their second axis.
    """
    if isinstance(layers, nn.Module):
        sections = stacking.sections(kinds)
        outputs = []
        for section in sections:
            loop = _make_loop(body, section, remat_policy, is_all=section.num_layers == len(kinds))
            numbers = section.start + section.period * jnp.arange(section.turns)
            carry, output = loop(layers, carry, numbers)
            outputs.append(output)
        # Reshapes the outputs of each section from [B, turns, period, ...] to [B, layers, ...].
        flat = [
            jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), output)
            for output in outputs
        ]
        return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *flat)
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
    """Returns the loop over the layers of a section.

    The loop is a function of the stacked layers, the carry, and the index of the first layer of
    each turn.
    """
    # If a single section has all layers, and each turn has one layer, the loop itself slices the
    # stack. Otherwise each body indexes the whole stack, since slicing out sections or periods
    # before the loop would copy the parameters.
    is_sliced = is_all and section.period == 1

    def turn(stack: nn.Module, carry: Any, first: Index) -> tuple[Any, Any]:
        outputs = []
        for offset, kind in enumerate(section.kinds):

            def one(
                layer: nn.Module, carry: Any, number: Index, offset: int = offset, kind: Any = kind
            ) -> tuple[Any, Any]:
                with _within(_Loop(number, section.start + offset)):
                    return body(layer, carry, number, kind)

            # The parameters of the layer are read within the rematerialised function. Otherwise
            # they would be saved for the backward pass. The compiler unrolls a loop of one turn,
            # and its common subexpression elimination (CSE) could then undo rematerialisation. With
            # several turns, the forward and the backward pass are in different loops, so CSE need
            # not be prevented.
            own = _rematerialised(
                one if is_sliced else _reading_own_layer(one), remat_policy,
                prevent_cse=section.turns == 1,
            )  # fmt: skip
            carry, output = own(stack, carry, first + offset)
            outputs.append(output)
        return carry, jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *outputs)

    how: dict[str, Any] = (
        {"variable_axes": {"params": 0}} if is_sliced else {"variable_broadcast": "params"}
    )
    return nn.scan(
        turn,
        split_rngs={"params": True, "dropout": True},
        length=section.turns,
        out_axes=1,
        **how,
    )


def _reading_own_layer(one: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of the stacked layers that calls `one` with one layer's parameters."""

    def read(stack: nn.Module, carry: Any, number: Index) -> tuple[Any, Any]:
        def take(params: PyTree) -> PyTree:
            return jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), params
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


def slice_of_layer(array: Array, ndim: int) -> Array:
    """Returns the current layer's slice of an array that the loop over layers does not slice.

    Args:
      array: array with the layers as its first axis, or an array of a single layer, which is
        returned unchanged.
      ndim: number of axes of the slice for one layer.
    """
    loop = _loop.get()
    if array.ndim == ndim or loop is None:
        return array
    return lax.dynamic_index_in_dim(array, loop.number, keepdims=False)


def key_of_layer(key: Key[Array, ""]) -> Key[Array, ""]:
    """Derives a key for the current layer from the key that Flax gives to a turn of the loop.

    Flax gives each turn of a loop a different key. However, all layers of a turn get the same key,
    and successive loops get the same keys as the first loop.
    """
    loop = _loop.get()
    return key if loop is None or loop.body == 0 else jax.random.fold_in(key, loop.body)


def take_layer(outputs: Any, number: Index) -> Any:
    """Selects the output of one layer from the outputs that `run_layers` returns."""
    if isinstance(number, int):
        return outputs[number]
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False), outputs
    )


def extend_cache(cache: Any, new: Any, number: Index, slot: Int[Array, ""]) -> tuple[Any, Any]:
    """Writes the keys and values of one decode step into the cache.

    Args:
      cache: keys and values of all layers, in the form of the outputs of `run_layers`: a tuple with
        arrays [B, H, L, K] for each layer, or stacked arrays [B, layers, H, L, K].
      new: keys and values of the step's tokens in this layer, [B, H, 1, K].
      number: index of the layer.
      slot: index on axis L that is written.

    Returns:
      All keys and values of the layer, and the new cache.
    """
    if isinstance(number, int):
        layer = jax.tree.map(
            lambda old, x: lax.dynamic_update_slice_in_dim(old, x, slot, axis=2),
            cache[number],
            new,
        )
        return layer, (*cache[:number], layer, *cache[number + 1 :])
    # XLA updates the cache in place: it writes only the slot, and reads the layer without a copy.
    cache = jax.tree.map(
        lambda old, x: lax.dynamic_update_slice(old, x[:, None], (0, number, 0, slot, 0)),
        cache,
        new,
    )
    return take_layer(cache, number), cache
