"""What a model family gives to the rollout and to the losses."""

from typing import Any, Protocol, TypeAlias

import jax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch

DecodeState: TypeAlias = PyTree[Any]
"""A model's decoding state. Every leaf has the batch as its first axis, so that samplers may
repeat rows (several samples a prompt) or gather them (beam search) without knowing more."""


class LanguageModel(Protocol):
    """A conditional language model as pure functions of its parameters.

    Hidden states and `unembed` are apart because a loss made in chunks needs them so. A model
    knows no loss, sampler or mesh.
    """

    @property
    def config(self) -> Any:
        """The frozen dataclass of sizes that defines this model."""
        ...

    def __hash__(self) -> int:
        """Models are values: what was jitted for one serves its equal too."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer, padding of the vocabulary included."""
        ...

    @property
    def hidden_size(self) -> int:
        """D, the width of hidden states."""
        ...

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes float32 parameters; jit-able."""
        ...

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters, without allocating them."""
        ...

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Logical axis names of each parameter, e.g. `PartitionSpec('embed', 'mlp')`."""
        ...

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states from which `unembed` predicts `batch.targets[:, t]` at position t.

        Where rows are packed (`batch.targets_segments`), an example of a row sees no other.
        Dropout is on exactly when `dropout_key` is given.
        """
        ...

    def head(self, params: Params) -> Params:
        """The part of the parameters that `unembed` reads, which takes it in place of all."""
        ...

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Hidden states to float32 logits, with the model's own scale, bias and soft cap."""
        ...

    def prefill(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        max_length: int,
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Reads the prompts; returns the hidden state of the first output position.

        The state has room for `max_length` output tokens.
        """
        ...

    def decode_step(
        self,
        params: Params,
        state: DecodeState,
        tokens: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Feeds the output tokens at position `index`; returns hidden states for the next."""
        ...
