"""The interface of a language model, which rollouts and losses call."""

from typing import Any, Protocol, TypeAlias

import jax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch

DecodeState: TypeAlias = PyTree[Any]
"""State of a model between decoding steps. The first axis of every array is the batch. Samplers can
therefore repeat rows (several samples per prompt) or gather them (beam search) for any model."""


class LanguageModel(Protocol):
    """A conditional language model as pure functions of its parameters.

    Hidden states and logits are computed by separate functions, because the chunked loss computes
    the logits of only one chunk of the hidden states at a time. A model does not depend on losses,
    samplers or meshes.
    """

    @property
    def config(self) -> Any:
        """The frozen dataclass of sizes and variants that defines the model."""
        ...

    def __hash__(self) -> int:
        """Equal models have equal hashes, so that they share jitted functions."""
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
        """Computes the hidden states of all output positions.

        `unembed` maps the hidden states at position t to the logits of `batch.targets[:, t]`. If
        rows are packed (`batch.targets_segments`), examples do not attend to each other.

        Args:
          params: the parameters.
          batch: prompts and outputs.
          dropout_key: key of the dropout; None turns dropout off.
        """
        ...

    def head(self, params: Params) -> Params:
        """Returns the parameters that `unembed` reads.

        `unembed` accepts the returned tree in place of all parameters.
        """
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
        """Processes the prompts in one forward pass.

        Returns:
          The hidden states that predict the first output token, and a state with room for
          `max_length` output tokens.
        """
        ...

    def decode_step(
        self,
        params: Params,
        state: DecodeState,
        tokens: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Feeds the output tokens at position `index` to the model.

        Returns:
          The hidden states that predict the next token, and the new state.
        """
        ...
