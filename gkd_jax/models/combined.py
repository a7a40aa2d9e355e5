"""Several models that speak as one: what mixes teachers, and lets a teacher into a rollout.

A combined model is a `LanguageModel` like any other, so the decoder, beam search and the losses
take it as it is. Its hidden state is those of its parts, side by side; its output layer makes
each part's next-token distribution and combines them to one.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.models.base import DecodeState, LanguageModel


@dataclasses.dataclass(frozen=True)
class CombinedModel(abc.ABC):
    """Models over one vocabulary whose next-token distributions are combined to one.

    Parameters are a tuple of those of the parts, in their order. Subclasses say how to combine.

    Attributes:
      models: the parts; their output layers have one size.

    Raises:
      ValueError: there are no parts, or their output layers differ in size.
    """

    models: tuple[LanguageModel, ...]

    def __post_init__(self) -> None:
        # A list, as gin gives it, could not be hashed.
        object.__setattr__(self, "models", tuple(self.models))
        name = type(self).__name__
        if not self.models:
            raise ValueError(f"{name}.models is empty. Give at least one model.")
        sizes = [model.vocab_size for model in self.models]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{name}.models must have output layers of one size; got {sizes}. Set vocab_size "
                "of all alike, or give each as `narrowed` to the least, on one vocabulary."
            )

    @abc.abstractmethod
    def combine(
        self, logits: tuple[Float[Array, "*n V"], ...], rest: Float[Array, "*n R"]
    ) -> Float[Array, "*n V"]:
        """Float32 logits of the parts to those of the combined distribution.

        Args:
          logits: of each part.
          rest: columns of the hidden states behind those of the parts; most models have none.
        """

    @property
    def config(self) -> Any:
        """This dataclass itself, which holds all sizes."""
        return self

    @property
    def vocab_size(self) -> int:
        """Rows of each part's output layer."""
        return self.models[0].vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the parts' hidden states together."""
        return sum(model.hidden_size for model in self.models)

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes float32 parameters of all parts; jit-able."""
        keys = jax.random.split(key, len(self.models))
        return tuple(model.init(key) for model, key in zip(self.models, keys, strict=True))

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parts' parameters."""
        return tuple(model.abstract_params() for model in self.models)

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Logical axis names of the parts' parameters."""
        return tuple(model.logical_axes() for model in self.models)

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states of all parts, side by side; dropout, if any, differs between them."""
        keys: Any = [None] * len(self.models)
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, len(self.models))
        parts = zip(self.models, params, keys, strict=True)
        return _side_by_side(
            [model.hidden_states(own, batch, dropout_key=key) for model, own, key in parts]
        )

    def head(self, params: Params) -> Params:
        """The parts' heads."""
        return tuple(model.head(own) for model, own in zip(self.models, params, strict=True))

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Hidden states of all parts to the logarithm of the combined distribution."""
        logits, start = [], 0
        for model, own in zip(self.models, params, strict=True):
            part = hidden[..., start : start + model.hidden_size]
            logits.append(model.unembed(own, part).astype(jnp.float32))
            start += model.hidden_size
        return self.combine(tuple(logits), hidden[..., start:])

    def prefill(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        max_length: int,
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Lets every part read the prompts."""
        parts = [
            model.prefill(own, inputs, inputs_mask, max_length=max_length)
            for model, own in zip(self.models, params, strict=True)
        ]
        return _side_by_side([hidden for hidden, _ in parts]), tuple(state for _, state in parts)

    def decode_step(
        self,
        params: Params,
        state: DecodeState,
        tokens: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Feeds the same tokens to every part."""
        parts = [
            model.decode_step(own, one, tokens, index)
            for model, own, one in zip(self.models, params, state, strict=True)
        ]
        return _side_by_side([hidden for hidden, _ in parts]), tuple(state for _, state in parts)


@dataclasses.dataclass(frozen=True)
class MixtureModel(CombinedModel):
    """sum_i w_i P_i(. | x, y_<n): at every token, a mixture of the parts' distributions.

    Of several teachers it is one; of teacher and student it is MiniLLM's teacher-mixed sampler
    (arXiv 2306.08543, section 2.2: the teacher's share is 0.2).

    Attributes:
      weights: w_i, positive; divided by their sum.

    Raises:
      ValueError: the weights are not positive or not as many as the models.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.weights) != len(self.models) or not all(
            isinstance(weight, (int, float)) and 0 < weight < math.inf for weight in self.weights
        ):
            raise ValueError(
                f"MixtureModel.weights must be {len(self.models)} positive numbers, one a model; "
                f"got {self.weights}. Leave out a model that is to have no weight."
            )

    def combine(
        self, logits: tuple[Float[Array, "*n V"], ...], rest: Float[Array, "*n R"]
    ) -> Float[Array, "*n V"]:
        """log sum_i w_i softmax(logits_i)."""
        del rest
        total = sum(self.weights)
        parts = [
            jax.nn.log_softmax(one) + math.log(weight / total)
            for one, weight in zip(logits, self.weights, strict=True)
        ]
        return jax.nn.logsumexp(jnp.stack(parts), axis=0)


@dataclasses.dataclass(frozen=True)
class RoutedModel(CombinedModel):
    """Each example's distribution is that of one of the parts, which its `source_id` names.

    The batch must have a `source_id`. Every part runs on every row, since rows of all kinds are
    in one batch: it costs what a mixture costs. The last column of hidden states is the part's
    number, so that any slice of positions still tells. Prompts alone do not, so it cannot decode.

    Attributes:
      routes: the part that each source of the data has.
    """

    routes: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "routes", tuple(self.routes))

    @property
    def hidden_size(self) -> int:
        """Width of the parts' hidden states together, and one."""
        return super().hidden_size + 1

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states of all parts, then the number of the example's own part."""
        hidden = super().hidden_states(params, batch, dropout_key=dropout_key)
        assert batch.source_id is not None, "the data set gives it to routed teachers"
        part = jnp.array(self.routes)[batch.source_id]
        if part.ndim == 1:  # Of a row; where rows are packed, of a position.
            part = jnp.broadcast_to(part[:, None], hidden.shape[:2])
        return _side_by_side([hidden, part[..., None].astype(hidden.dtype)])

    def combine(
        self, logits: tuple[Float[Array, "*n V"], ...], rest: Float[Array, "*n R"]
    ) -> Float[Array, "*n V"]:
        """The logits of each position's own part."""
        chosen = logits[0]
        for number, one in enumerate(logits[1:], start=1):
            chosen = jnp.where(rest == number, one, chosen)
        return chosen

    def prefill(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "teachers that are chosen by an example's source score outputs, and cannot write them. "
            "Take one of them as the teacher."
        )


@dataclasses.dataclass(frozen=True)
class CorrectedModel(CombinedModel):
    """The student proposes a token, the teacher replaces it where it is not among its best K.

    Speculative knowledge distillation (arXiv 2410.11325). A proposal outside the teacher's top K
    is drawn again from the teacher, so a token v has the probability

        q_v [v in top K of P]  +  (1 - sum of q over top K of P) p_v

    which is what this model's output layer gives: sampling from it is the method, exactly.

    Attributes:
      models: the student, then the teacher.
      top_k: K, how many of the teacher's best tokens are left as they were proposed.

    Raises:
      ValueError: there are not two models, or K is not from 1 to the vocabulary's size.
    """

    top_k: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.models) != 2:
            raise ValueError(
                f"CorrectedModel.models must be student and teacher; got {len(self.models)} models."
            )
        if not (isinstance(self.top_k, int) and 1 <= self.top_k <= self.vocab_size):
            raise ValueError(
                f"CorrectedModel.top_k must be from 1 to the vocabulary's size {self.vocab_size}; "
                f"got {self.top_k!r}. The paper uses 25."
            )

    def combine(
        self, logits: tuple[Float[Array, "*n V"], ...], rest: Float[Array, "*n R"]
    ) -> Float[Array, "*n V"]:
        """log of the accepted proposals' share plus the redrawn ones'."""
        del rest
        student, teacher = (jax.nn.softmax(one) for one in logits)
        # Ties at the edge are all accepted: a mask by value needs no scatter.
        least = jax.lax.top_k(logits[1], self.top_k)[0][..., -1:]
        is_accepted = logits[1] >= least
        accepted = jnp.where(is_accepted, student, 0.0)
        # Not 1 minus what is accepted: that would be a rounding away from 0.
        redrawn = jnp.sum(jnp.where(is_accepted, 0.0, student), axis=-1, keepdims=True)
        return jnp.log(accepted + redrawn * teacher)


def _side_by_side(parts: list[Array]) -> Array:
    """Joins hidden states; bfloat16 beside float32 becomes float32, which holds both."""
    return jnp.concatenate(parts, axis=-1)
