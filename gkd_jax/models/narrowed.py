"""A model over the first entries of its output layer alone: where padded vocabularies differ."""

import dataclasses

from gkd_jax.common.array_types import Array, Float, Params
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.wrapped import WrappedModel


def narrowed(model: LanguageModel, vocab_size: int) -> LanguageModel:
    """The model over at most `vocab_size` entries; itself where it has no more."""
    return model if model.vocab_size <= vocab_size else NarrowedModel(model, vocab_size)


@dataclasses.dataclass(frozen=True)
class NarrowedModel(WrappedModel):
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

    vocab_size: int

    def __post_init__(self) -> None:
        assert 1 <= self.vocab_size < self.model.vocab_size, "made by `narrowed`"

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits of the entries that are kept."""
        return super().unembed(params, hidden)[..., : self.vocab_size]
