"""A model over the first entries of its output layer alone: where padded vocabularies differ."""

import dataclasses
from typing import Any

import jax

from gkd_jax.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.batch import Batch
from gkd_jax.models.base import DecodeState, LanguageModel


def narrowed(model: LanguageModel, vocab_size: int) -> LanguageModel:
    """The model over at most `vocab_size` entries; itself where it has no more."""
    return model if model.vocab_size <= vocab_size else NarrowedModel(model, vocab_size)


@dataclasses.dataclass(frozen=True)
class NarrowedModel:
    """P(. | x, y_<n) given that the token is one of the first entries; a `LanguageModel`.

    Output layers are padded to sizes that hardware likes. Two models over one vocabulary that are
    padded to different sizes have their first entries in common, and are compared and sampled
    from over those alone: each softmax is over them, so that both distributions sum to 1.

    Parameters are the wrapped model's. Logits are cut, not the output layer: a slice that is read
    where it is used costs nothing, while one of the layer would be a copy of it, and its gradient
    another.

    Attributes:
      model: the model with further entries.
      vocab_size: how many of its entries are kept.
    """

    model: LanguageModel
    vocab_size: int

    def __post_init__(self) -> None:
        assert 1 <= self.vocab_size < self.model.vocab_size, "made by `narrowed`"

    @property
    def config(self) -> Any:
        """Sizes of the wrapped model."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Width of hidden states."""
        return self.model.hidden_size

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes the parameters, those of the further entries included."""
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
        return self.model.hidden_states(params, batch, dropout_key=dropout_key)

    def head(self, params: Params) -> Params:
        """The whole head."""
        return self.model.head(params)

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits of the entries that are kept."""
        return self.model.unembed(params, hidden)[..., : self.vocab_size]

    def prefill(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        max_length: int,
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Reads the prompts."""
        return self.model.prefill(params, inputs, inputs_mask, max_length=max_length)

    def decode_step(
        self,
        params: Params,
        state: DecodeState,
        tokens: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Feeds the output tokens at position `index`."""
        return self.model.decode_step(params, state, tokens, index)
