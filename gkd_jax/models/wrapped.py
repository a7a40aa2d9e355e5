"""What models around another model share."""

import contextlib
import dataclasses
from typing import Any

import jax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.models.base import DecodeState, LanguageModel
from gkd_jax.models.linen import LinenModel


@dataclasses.dataclass(frozen=True)
class WrappedModel:
    """A `LanguageModel` that does what another does, but for what a subclass changes.

    Attributes:
      model: the other.
    """

    model: LanguageModel

    def inner(self, params: Params) -> Params:
        """The wrapped model's parameters within those of this one, or within its `head`."""
        return params

    def tracing(self, params: Params) -> contextlib.AbstractContextManager[Any]:
        """What holds while a function of the wrapped model is traced."""
        del params
        return contextlib.nullcontext()

    @property
    def config(self) -> Any:
        """Sizes of the wrapped model."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Width of hidden states."""
        return self.model.hidden_size

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes the parameters."""
        return self.model.init(key)

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters."""
        return self.model.abstract_params()

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Logical axis names of the parameters."""
        return self.model.logical_axes()

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states, as the wrapped model has them."""
        with self.tracing(params):
            return self.model.hidden_states(self.inner(params), batch, dropout_key=dropout_key)

    def head(self, params: Params) -> Params:
        """The wrapped model's head."""
        return self.model.head(self.inner(params))

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits; reads all parameters, or what `head` gave."""
        return self.model.unembed(self.inner(params), hidden)

    def prefill(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        max_length: int,
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Reads the prompts."""
        with self.tracing(params):
            return self.model.prefill(
                self.inner(params), inputs, inputs_mask, max_length=max_length
            )

    def decode_step(
        self,
        params: Params,
        state: DecodeState,
        tokens: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Feeds the output tokens at position `index`."""
        with self.tracing(params):
            return self.model.decode_step(self.inner(params), state, tokens, index)


def with_remat_policy(model: LanguageModel, policy: str) -> LanguageModel:
    """The same model with another policy of rematerialisation; one that has none, itself."""
    if isinstance(model, WrappedModel):
        return dataclasses.replace(model, model=with_remat_policy(model.model, policy))
    if isinstance(model, LinenModel):
        config = dataclasses.replace(model.config, remat_policy=policy)
        return dataclasses.replace(model, config=config)  # type: ignore[type-var]
    return model
