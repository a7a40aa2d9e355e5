"""Ensembles: several models whose next-token distributions are combined into one.

An ensemble of several teachers can be used as one teacher. An ensemble of student and teacher can
generate rollouts. An ensemble is a `LanguageModel`, so decoding, beam search and losses treat it
like any other model. Its hidden states are the concatenated hidden states of its models. Its output
layer computes the distribution of each model and combines these distributions.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.common.moved import load_moved
from gkd_jax.models.base import DecodeState, LanguageModel


@dataclasses.dataclass(frozen=True)
class EnsembleModel(abc.ABC):
    """Models over one vocabulary whose next-token distributions are combined into one.

    The parameters are a tuple with the parameters of each model, in the order of `models`.
    Subclasses define `combine`.

    Attributes:
      models: models whose output layers have the same size.

    Raises:
      ValueError: there are no models, or their output layers differ in size.
    """

    models: tuple[LanguageModel, ...]

    def __post_init__(self) -> None:
        # Gin gives a list, which cannot be hashed.
        object.__setattr__(self, "models", tuple(self.models))
        name = type(self).__name__
        if not self.models:
            raise ValueError(f"{name}.models is empty. Give at least one model.")
        sizes = [model.vocab_size for model in self.models]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{name}.models must have output layers of one size; got {sizes}. Set vocab_size "
                "of all alike, or restrict each by `models.wrapper.restrict_vocabulary` to the "
                "least, on one vocabulary."
            )

    @abc.abstractmethod
    def combine(
        self, logits: tuple[Float[Array, "*n V"], ...], rest: Float[Array, "*n R"]
    ) -> Float[Array, "*n V"]:
        """Combines the float32 logits of the models into logits of the ensemble's distribution.

        Args:
          logits: logits of each model.
          rest: columns that the ensemble appends to the models' hidden states. Most ensembles
            append none.
        """

    @property
    def config(self) -> Any:
        """The ensemble itself, which contains the configurations of its models."""
        return self

    @property
    def vocab_size(self) -> int:
        """Size of each model's output layer."""
        return self.models[0].vocab_size

    @property
    def hidden_size(self) -> int:
        """Sum of the widths of the models' hidden states."""
        return sum(model.hidden_size for model in self.models)

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random float32 parameters of all models; can be jitted."""
        keys = jax.random.split(key, len(self.models))
        return tuple(model.init(key) for model, key in zip(self.models, keys, strict=True))

    def abstract_params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the models' parameters."""
        return tuple(model.abstract_params() for model in self.models)

    def logical_axes(self) -> PyTree[jax.sharding.PartitionSpec]:
        """Returns the logical axis names of the models' parameters."""
        return tuple(model.logical_axes() for model in self.models)

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Computes and concatenates the hidden states of all models.

        Each model has its own dropout key.
        """
        keys: Any = [None] * len(self.models)
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, len(self.models))
        return _concatenate(
            [
                model.hidden_states(own, batch, dropout_key=key)
                for model, own, key in zip(self.models, params, keys, strict=True)
            ]
        )

    def head(self, params: Params) -> Params:
        """Returns the parameters of the models' output layers."""
        return tuple(model.head(own) for model, own in zip(self.models, params, strict=True))

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Computes logits of the ensemble's distribution from the models' hidden states."""
        logits, start = [], 0
        for model, own in zip(self.models, params, strict=True):
            own_hidden = hidden[..., start : start + model.hidden_size]
            logits.append(model.unembed(own, own_hidden).astype(jnp.float32))
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
        """Processes the prompts with every model."""
        results = [
            model.prefill(own, inputs, inputs_mask, max_length=max_length)
            for model, own in zip(self.models, params, strict=True)
        ]
        return _concatenate([hidden for hidden, _ in results]), tuple(state for _, state in results)

    def decode_step(
        self,
        params: Params,
        state: DecodeState,
        tokens: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], DecodeState]:
        """Feeds the same tokens to every model."""
        results = [
            model.decode_step(own, one, tokens, index)
            for model, own, one in zip(self.models, params, state, strict=True)
        ]
        return _concatenate([hidden for hidden, _ in results]), tuple(state for _, state in results)


@dataclasses.dataclass(frozen=True)
class MixtureModel(EnsembleModel):
    """A mixture of the models' next-token distributions, with fixed weights.

        P(y_n | x, y_<n) = sum_i w_i P_i(y_n | x, y_<n)

    A mixture of several teachers can be used as one teacher. A mixture of student and teacher is
    the distribution of teacher-mixed sampling ("MiniLLM: Knowledge Distillation of Large Language
    Models", arXiv 2306.08543, section 2.2, where the teacher's weight is 0.2).

    Attributes:
      weights: w_i, the positive weights of the models. They are normalised to sum to 1.

    Raises:
      ValueError: a weight is not positive, or the numbers of weights and models differ.
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
        """Returns log sum_i w_i softmax(logits_i)."""
        del rest
        total = sum(self.weights)
        weighted = [
            jax.nn.log_softmax(one) + math.log(weight / total)
            for one, weight in zip(logits, self.weights, strict=True)
        ]
        return jax.nn.logsumexp(jnp.stack(weighted), axis=0)


@dataclasses.dataclass(frozen=True)
class RoutedModel(EnsembleModel):
    """An ensemble that uses a different model for each data source, given by `source_id`.

    The batch must have a `source_id`. A batch contains rows of all sources, so every model runs on
    every row, and the cost is as high as for a mixture. The last column of the hidden states is the
    index of the model. `unembed` reads the index from there, so it can be called with any subset of
    positions. A routed model cannot decode, since `prefill` receives no `source_id`.

    Attributes:
      routes: index of the model for each source of the data.
    """

    routes: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "routes", tuple(self.routes))

    @property
    def hidden_size(self) -> int:
        """Sum of the widths of the models' hidden states, plus one."""
        return super().hidden_size + 1

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Computes the hidden states of all models, and appends the index of the row's model."""
        hidden = super().hidden_states(params, batch, dropout_key=dropout_key)
        assert batch.source_id is not None, "the data set gives it to routed teachers"
        index = jnp.array(self.routes)[batch.source_id]
        if index.ndim == 1:  # One index per row, since rows are not packed.
            index = jnp.broadcast_to(index[:, None], hidden.shape[:2])
        return _concatenate([hidden, index[..., None].astype(hidden.dtype)])

    def combine(
        self, logits: tuple[Float[Array, "*n V"], ...], rest: Float[Array, "*n R"]
    ) -> Float[Array, "*n V"]:
        """Selects at each position the logits of the model given by `rest`."""
        chosen = logits[0]
        for number, one in enumerate(logits[1:], start=1):
            chosen = jnp.where(rest == number, one, chosen)
        return chosen

    def prefill(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Not supported.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "teachers that are chosen by an example's source score outputs, and cannot write them. "
            "Take one of them as the teacher."
        )


@dataclasses.dataclass(frozen=True)
class CorrectedModel(EnsembleModel):
    """The student's distribution if the teacher replaces all tokens outside the teacher's top K.

    Speculative knowledge distillation ("Speculative Knowledge Distillation: Bridging the
    Teacher-Student Gap Through Interleaved Sampling", arXiv 2410.11325): the student proposes a
    token. If this token is not among the teacher's K most likely tokens, it is replaced by a token
    sampled from the teacher. A token v therefore has the probability

        q_v [v in top K of P]  +  (1 - sum of q over top K of P) p_v

    with the student's probabilities q and the teacher's p. The bracket is 1 if v is in the top K,
    and otherwise 0. The output layer of this model computes these probabilities, so sampling from
    this model is equivalent to the method.

    Attributes:
      models: the student, then the teacher.
      top_k: K. A proposal among the teacher's K most likely tokens is accepted.

    Raises:
      ValueError: the number of models is not 2, or K is not from 1 to the vocabulary's size.
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
        """Returns the logarithms of the probabilities defined in the class's docstring."""
        del rest
        student, teacher = (jax.nn.softmax(one) for one in logits)
        # Logits are compared with the K-th largest. This needs no scatter, unlike a mask made from
        # the indices of `top_k`. If several tokens have the K-th largest logit, all are accepted.
        least = jax.lax.top_k(logits[1], self.top_k)[0][..., -1:]
        is_accepted = logits[1] >= least
        accepted = jnp.where(is_accepted, student, 0.0)
        # The rejected probability is summed directly, so that it is exactly 0 if nothing is
        # rejected. 1 minus the accepted probability would have a rounding error.
        rejected = jnp.sum(jnp.where(is_accepted, 0.0, student), axis=-1, keepdims=True)
        return jnp.log(accepted + rejected * teacher)


def _concatenate(hidden: list[Array]) -> Array:
    """Concatenates hidden states; a mix of bfloat16 and float32 becomes float32."""
    return jnp.concatenate(hidden, axis=-1)


def __getattr__(name: str) -> Any:
    return load_moved(__name__, name)
