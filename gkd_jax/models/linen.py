"""Base class of models that are defined by a Flax Linen module."""

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.models import stacking


# Cached because tracing a deep model takes seconds and a run needs the result a dozen times.
@functools.lru_cache(maxsize=16)
def _abstract_boxed_params(model: "LinenModel") -> PyTree:
    return jax.eval_shape(model._boxed_params, jax.random.key(0))


class LinenModel(abc.ABC):
    """A `LanguageModel` that is defined by a Linen module. Subclasses are frozen dataclasses.

    Attributes:
      config: sizes and variants, including `vocab_size`, `emb_dim` and `scan_layers`.
    """

    config: Any
    # Slot that `module.step` receives for output position 0.
    _first_slot: ClassVar[int] = 0

    @property
    @abc.abstractmethod
    def module(self) -> nn.Module:
        """The Linen module."""

    @abc.abstractmethod
    def _boxed_params(self, key: Key[Array, ""]) -> PyTree:
        """Makes random parameters, not stacked, in Flax's boxes that hold the logical axes."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, including padding of the vocabulary."""
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.config.emb_dim

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random float32 parameters; can be jitted."""
        params = nn.meta.unbox(self._boxed_params(key))
        # Stacked after the initialisation, so that `scan_layers` does not change initial values.
        return stacking.stack(params) if self.config.scan_layers else params

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the parameters without allocating them."""
        params = nn.meta.unbox(_abstract_boxed_params(self))
        return jax.eval_shape(stacking.stack, params) if self.config.scan_layers else params

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Returns the logical axis names of each parameter. The names are the same as in T5X."""
        axes = nn.get_partition_spec(_abstract_boxed_params(self))
        if not self.config.scan_layers:
            return axes

        def stacked(*layers: jax.sharding.PartitionSpec) -> jax.sharding.PartitionSpec:
            return jax.sharding.PartitionSpec(stacking.STACKED, *layers[0])

        return stacking.stack(axes, stacked)

    def prefill(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        max_length: int,
    ) -> tuple[Float[Array, "B D"], Any]:
        """Processes the prompts in one forward pass. T5's decoder also processes its start token.

        Args:
          params: the parameters.
          inputs: prompt tokens, with padding at any position.
          inputs_mask: True on real tokens. A decoder-only model needs at least one in each row.
          max_length: number of output tokens that the state has room for. The last output token is
            never fed to the model, so the cache has no slot for it.

        Returns:
          The hidden states that predict the first output token, and the state.

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
        """Feeds the output tokens at position `index` to the model.

        Args:
          params: the parameters.
          state: from `prefill` or the previous step.
          tokens: output tokens at position `index`.
          index: position in the output, from 0 to max_length - 2; may be traced.

        Returns:
          The hidden states that predict the token at position `index + 1`, and the new state.
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
        # Dropout is active if and only if there is a key named 'dropout'.
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply({"params": params}, *arguments, rngs=rngs, method=method)


def check_max_length(max_length: int) -> None:
    """Checks that a decoding state has room for at least one token.

    Raises:
      ValueError: `max_length` is below 1.
    """
    if max_length < 1:
        raise ValueError(
            f"max_length must be at least 1; got {max_length}. Set it to the longest output "
            "to generate."
        )
