"""Models that wrap another model and change a part of its behaviour.

`ModelWrapper` delegates everything to the wrapped model. Its subclasses are `RestrictedVocabulary`,
`lora.LoRA` and `quantised.Int8`.
"""

import contextlib
import dataclasses
from typing import Any

import jax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.common.moved import load_moved
from gkd_jax.models.base import DecodeState, LanguageModel
from gkd_jax.models.linen import LinenModel


@dataclasses.dataclass(frozen=True)
class ModelWrapper:
    """A `LanguageModel` that delegates to another model. Subclasses override parts of it.

    Attributes:
      model: the wrapped model.
    """

    model: LanguageModel

    def inner(self, params: Params) -> Params:
        """Extracts the wrapped model's parameters.

        Args:
          params: the parameters of this model, or the part of them that `head` returns.
        """
        return params

    def tracing(self, params: Params) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which the functions of the wrapped model are called.

        Subclasses override this method to change matrix products while the functions are traced.
        """
        del params
        return contextlib.nullcontext()

    @property
    def config(self) -> Any:
        """The configuration of the wrapped model."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.model.hidden_size

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random parameters."""
        return self.model.init(key)

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the parameters."""
        return self.model.abstract_params()

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Returns the logical axis names of the parameters."""
        return self.model.logical_axes()

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Computes the hidden states of the wrapped model."""
        with self.tracing(params):
            return self.model.hidden_states(self.inner(params), batch, dropout_key=dropout_key)

    def head(self, params: Params) -> Params:
        """Returns the parameters of the output layer."""
        return self.model.head(self.inner(params))

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Computes logits from all parameters, or from those that `head` returns."""
        return self.model.unembed(self.inner(params), hidden)

    def prefill(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        max_length: int,
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Processes the prompts."""
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
        """Feeds the output tokens at position `index` to the model."""
        with self.tracing(params):
            return self.model.decode_step(self.inner(params), state, tokens, index)


def with_remat_policy(model: LanguageModel, policy: str) -> LanguageModel:
    """Returns the model with another rematerialisation policy.

    A model without such a setting is returned unchanged.
    """
    if isinstance(model, ModelWrapper):
        return dataclasses.replace(model, model=with_remat_policy(model.model, policy))
    if isinstance(model, LinenModel):
        config = dataclasses.replace(model.config, remat_policy=policy)
        return dataclasses.replace(model, config=config)  # type: ignore[type-var]
    return model


def restrict_vocabulary(model: LanguageModel, vocab_size: int) -> LanguageModel:
    """Restricts a model to the first `vocab_size` entries of its vocabulary.

    A model with at most `vocab_size` entries is returned unchanged.

    Args:
      model: any model.
      vocab_size: number of entries to keep.
    """
    return model if model.vocab_size <= vocab_size else RestrictedVocabulary(model, vocab_size)


@dataclasses.dataclass(frozen=True)
class RestrictedVocabulary(ModelWrapper):
    """A model whose softmax is restricted to the first entries of its vocabulary.

    Output layers are padded to sizes that suit the hardware. Two models with the same vocabulary
    but different padding share only their first entries. Losses and samplers use these entries
    alone. The softmax is also taken over these entries alone, so that the distributions of both
    models sum to 1.

    The parameters are the same as in the wrapped model. The logits are sliced instead of the output
    layer. XLA fuses a slice of the logits into the operations that read the slice, at no cost. A
    slice of the output layer would be a copy, both in the forward pass and for its gradient.

    Attributes:
      model: the wrapped model, whose vocabulary is larger.
      vocab_size: number of entries that are kept.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        assert 1 <= self.vocab_size < self.model.vocab_size, "made by `restrict_vocabulary`"

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        return super().unembed(params, hidden)[..., : self.vocab_size]


def __getattr__(name: str) -> Any:
    return load_moved(__name__, name)
