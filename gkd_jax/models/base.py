"""The interface of a model: what rollouts and losses call."""

from typing import Any, Protocol, TypeAlias

import jax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch

DecodeState: TypeAlias = PyTree[Any]
"""A model's decoding state. The first axis of every array is the batch, so that samplers can
repeat rows (several samples per prompt) or gather them (beam search) without knowing the model."""


class LanguageModel(Protocol):
    """A conditional language model as pure functions of its parameters.

    Hidden states and logits are computed by separate functions because the chunked loss needs them
    separately. A model knows nothing of losses, samplers or meshes.
    """

    @property
    def config(self) -> Any:
        """The frozen dataclass of sizes and variants that defines the model."""
        ...

    def __hash__(self) -> int:
        """Models are values: a function that was jitted for one also serves an equal one."""
        ...

    @property
    def vocab_size(self) -> int:
        """Size of the output layer, including padding of the vocabulary."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, D."""
        ...

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random float32 parameters; can be jitted."""
        ...

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the parameters without allocating them."""
        ...

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Returns each parameter's logical axis names, e.g. `PartitionSpec('embed', 'mlp')`."""
        ...

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Computes the hidden states from which `unembed` predicts `batch.targets[:, t]`.

        In packed rows (`batch.targets_segments`) the examples of a row do not see each other.

        Args:
          params: the parameters.
          batch: prompts and outputs.
          dropout_key: key of the dropout; None turns dropout off.
        """
        ...

    def head(self, params: Params) -> Params:
        """Returns the parameters that `unembed` reads. It accepts these in place of all."""
        ...

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Computes float32 logits, including the model's own scale, bias and soft cap."""
        ...

    def prefill(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        max_length: int,
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Reads the prompts in one pass.

        Returns:
          The hidden states of the first output position, and a state with room for `max_length`
          output tokens.
        """
        ...

    def decode_step(
        self,
        params: Params,
        state: DecodeState,
        tokens: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Feeds the output tokens at position `index`.

        Returns:
          The hidden states of the next position, and the new state.
        """
        ...
