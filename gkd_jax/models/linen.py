"""What the families of models share: pure functions of a Linen module and its parameters."""

import abc
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from gkd_jax.array_types import Array, Key, Params, PyTree


class LinenModel(abc.ABC):
    """A Linen module behind the functions of a `LanguageModel`; subclasses are frozen dataclasses.

    Attributes:
      config: sizes and variant, with `vocab_size` and `emb_dim`.
    """

    config: Any

    @property
    @abc.abstractmethod
    def module(self) -> nn.Module:
        """The Linen module."""

    @abc.abstractmethod
    def _boxed_params(self, key: Key[Array, ""]) -> PyTree:
        """Random parameters in the boxes that hold their logical axes."""

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
        return nn.meta.unbox(self._boxed_params(key))

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters, without allocating them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Logical axis names of each parameter, in T5X's words."""
        return nn.get_partition_spec(jax.eval_shape(self._boxed_params, jax.random.key(0)))

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
