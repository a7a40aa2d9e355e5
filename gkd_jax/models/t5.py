"""T5 1.0 and 1.1, encoder-decoder models.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
arXiv 1910.10683. The parameter tree has the same names as T5X's minimal T5, so that T5X's
checkpoints can be loaded.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.models import layers
from gkd_jax.models.layer_loops import Index, extend_cache, make_layers, run_layers, take_layer
from gkd_jax.models.linen import LinenModel
from gkd_jax.models.t5_config import T5Config

KeysValues = tuple[Float[Array, "B H L K"], Float[Array, "B H L K"]]


@flax.struct.dataclass
class T5DecodeState:
    """The state of decoding between steps. The first axis of every array is the batch.

    Attributes:
      self_attention: keys and values of the decoder's input tokens, in a tuple with one entry per
        layer, or in arrays with the layers as their second axis. The start token is in slot 0,
        output position t in slot t + 1.
      cross_attention: keys and values of the encoded prompt, in the same form.
      inputs_mask: True on the real tokens of the prompt.
    """

    self_attention: tuple[KeysValues, ...] | KeysValues
    cross_attention: tuple[KeysValues, ...] | KeysValues
    inputs_mask: Bool[Array, "B S"]


def _norm(config: T5Config) -> layers.RMSNorm:
    return layers.RMSNorm(config.dtype)


def _attention(config: T5Config) -> layers.Attention:
    return layers.Attention(
        config.num_heads, config.head_dim, config.emb_dim, config.dropout_rate, config.dtype
    )


def _mlp(config: T5Config) -> layers.GatedMLP:
    return layers.GatedMLP(
        config.mlp_dim,
        config.emb_dim,
        config.mlp_activations,
        config.dropout_rate,
        config.dtype,
    )


def _dropout(config: T5Config) -> layers.Dropout:
    return layers.Dropout(config.dropout_rate)


class EncoderLayer(nn.Module):
    """Self-attention over the prompt, then the feed-forward block."""

    config: T5Config

    def setup(self) -> None:
        self.pre_attention_layer_norm = _norm(self.config)
        self.attention = _attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = _mlp(self.config)
        self.dropout = _dropout(self.config)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        relpos: Float[Array, "1 H S S"],
        mask: Bool[Array, "B 1 S S"],
    ) -> Float[Array, "B S D"]:
        y = self.pre_attention_layer_norm(x)
        keys, values = self.attention.keys_values(y)
        y = self.attention(y, keys, values, relpos, layers.mask_to_bias(mask))
        x = x + self.dropout(y)
        y = self.mlp(self.pre_mlp_layer_norm(x))
        return x + self.dropout(y)


class Encoder(nn.Module):
    """Encodes embedded prompts."""

    config: T5Config

    def setup(self) -> None:
        config = self.config
        self.relpos_bias = layers.RelativePositionBias(config.num_heads, bidirectional=True)
        self.layers = make_layers(
            lambda: EncoderLayer(config), config.num_encoder_layers, stacked=config.scan_layers
        )
        self.encoder_norm = _norm(config)
        self.dropout = _dropout(config)
        # As in T5X, only this dropout has a different mask for each position.
        self.final_dropout = layers.Dropout(config.dropout_rate, shared_over_positions=False)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        inputs_mask: Bool[Array, "B S"],
        segments: Int[Array, "B S"] | None,
    ) -> Float[Array, "B S D"]:
        length = x.shape[1]
        # As in T5X, queries at padding attend to no key. Their outputs are not used. They are
        # masked only so that all outputs of the encoder equal T5X's.
        mask = inputs_mask[:, None, :, None] & inputs_mask[:, None, None, :]
        if segments is not None:
            # `relpos` needs no change: it depends only on distances, which packing does not change
            # within an example.
            mask &= layers.same_segment(segments, segments)
        relpos = self.relpos_bias(length, length)

        def body(layer: EncoderLayer, x: Array, number: Index, kind: Any) -> tuple[Array, None]:
            return layer(x, relpos, mask), None

        config = self.config
        x, _ = run_layers(
            self.layers, body, self.dropout(x),
            kinds=("encoder",) * config.num_encoder_layers, remat_policy=config.remat_policy,
        )  # fmt: skip
        return self.final_dropout(self.encoder_norm(x))


class DecoderLayer(nn.Module):
    """Causal self-attention over the output, attention to the prompt, feed-forward block."""

    config: T5Config

    def setup(self) -> None:
        self.pre_self_attention_layer_norm = _norm(self.config)
        self.self_attention = _attention(self.config)
        self.pre_cross_attention_layer_norm = _norm(self.config)
        self.encoder_decoder_attention = _attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = _mlp(self.config)
        self.dropout = _dropout(self.config)

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> KeysValues:
        return self.encoder_decoder_attention.keys_values(encoded)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cross: KeysValues,
        self_biases: tuple[Float[Array, "#B #H #T L"], ...],
        cross_bias: Float[Array, "B 1 #T S"],
        keep: Callable[[KeysValues], tuple[KeysValues, PyTree]] = lambda new: (new, None),
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """Computes the layer, for a whole output or for one decode step.

        Args:
          x: hidden states.
          cross: keys and values of the encoded prompt.
          self_biases: biases whose sum is added to the self-attention's logits.
          cross_bias: bias of the cross-attention's logits.
          keep: function of the keys and values of `x`. It returns all keys and values that `x`
            attends to, and a second output of the layer, such as the updated cache.

        Returns:
          The new hidden states, and the second output of `keep`.
        """
        y = self.pre_self_attention_layer_norm(x)
        (keys, values), kept = keep(self.self_attention.keys_values(y))
        y = self.self_attention(y, keys, values, *self_biases)
        x = x + self.dropout(y)
        y = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(y, *cross, cross_bias)
        x = x + self.dropout(y)
        y = self.mlp(self.pre_mlp_layer_norm(x))
        return x + self.dropout(y), kept


class Decoder(nn.Module):
    """Maps embedded output tokens to hidden states, all at once or one position at a time."""

    config: T5Config

    def setup(self) -> None:
        config = self.config
        self.relpos_bias = layers.RelativePositionBias(config.num_heads, bidirectional=False)
        self.layers = make_layers(
            lambda: DecoderLayer(config), config.num_decoder_layers, stacked=config.scan_layers
        )
        self.decoder_norm = _norm(config)
        self.dropout = _dropout(config)
        if not config.logits_via_embedding:
            self.logits_dense = layers.Dense(config.vocab_size, ("embed", "vocab"), "float32")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        inputs_mask: Bool[Array, "B S"],
        inputs_segments: Int[Array, "B S"] | None,
        targets_segments: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        length = x.shape[1]
        # Padding follows the output, so the causal mask also hides it from the output. The loss
        # weights exclude the padding positions themselves.
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        whole = self.relpos_bias(length, length) + layers.mask_to_bias(causal)
        self_biases: tuple[Array, ...] = (whole,)
        seen = inputs_mask[:, None, None, :]
        if targets_segments is not None and inputs_segments is not None:
            own = layers.same_segment(targets_segments, targets_segments)
            self_biases += (layers.mask_to_bias(own),)
            seen &= layers.same_segment(targets_segments, inputs_segments)
        cross_bias = layers.mask_to_bias(seen)

        def body(layer: DecoderLayer, x: Array, number: Index, kind: Any) -> tuple[Array, None]:
            return layer(x, layer.cross_keys_values(encoded), self_biases, cross_bias)

        x, _ = self._run(body, self.dropout(x), remat_policy=self.config.remat_policy)
        return self.dropout(self.decoder_norm(x))

    def _run(self, body: Any, carry: Any, **options: Any) -> tuple[Any, Any]:
        kinds = ("decoder",) * self.config.num_decoder_layers
        return run_layers(self.layers, body, carry, kinds=kinds, **options)

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> PyTree:
        """Computes the cross-attention's keys and values in all layers.

        Returns a tuple with one entry per layer or, if parameters are stacked, arrays with the
        layers as their second axis.
        """

        def body(
            layer: DecoderLayer, carry: tuple, number: Index, kind: Any
        ) -> tuple[tuple, KeysValues]:
            return carry, layer.cross_keys_values(encoded)

        return self._run(body, ())[1]

    def empty_cache(self, batch_size: int, num_slots: int) -> PyTree:
        """Returns a cache of zeros in the form of `cross_keys_values`."""
        config = self.config
        depth = (config.num_decoder_layers,) if config.scan_layers else ()
        shape = (batch_size, *depth, config.num_heads, num_slots, config.head_dim)

        def zeros() -> KeysValues:
            return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)

        # Each layer has arrays of its own, since donated buffers must not be shared.
        return zeros() if depth else tuple(zeros() for _ in range(config.num_decoder_layers))

    def step(
        self, x: Float[Array, "B 1 D"], state: T5DecodeState, slot: Int[Array, ""]
    ) -> tuple[Float[Array, "B 1 D"], T5DecodeState]:
        num_slots = jax.tree.leaves(state.self_attention)[0].shape[-2]
        seen = (jnp.arange(num_slots) <= slot)[None, None, None]
        self_biases = (self.relpos_bias.row(slot, num_slots) + layers.mask_to_bias(seen),)
        cross_bias = layers.mask_to_bias(state.inputs_mask[:, None, None, :])

        def body(layer: DecoderLayer, carry: tuple, number: Index, kind: Any) -> tuple[tuple, None]:
            x, cache = carry
            cross = take_layer(state.cross_attention, number)

            def keep(new: KeysValues) -> tuple[KeysValues, PyTree]:
                return extend_cache(cache, new, number, slot)

            return layer(x, cross, self_biases, cross_bias, keep), None

        (x, cache), _ = self._run(body, (x, state.self_attention))
        return self.decoder_norm(x), dataclasses.replace(state, self_attention=cache)


class Transformer(nn.Module):
    """The Linen module, which defines the parameter tree and the computations."""

    config: T5Config

    def setup(self) -> None:
        config = self.config
        self.token_embedder = layers.Embed(config.vocab_size, config.emb_dim, config.dtype)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, inputs: Array, inputs_mask: Array, segments: Array | None = None) -> Array:
        embedded = self.token_embedder(inputs)
        return self.encoder(embedded, inputs_mask, segments)

    def hidden_states(
        self,
        inputs: Array,
        inputs_mask: Array,
        targets: Array,
        inputs_segments: Array | None = None,
        targets_segments: Array | None = None,
    ) -> Array:
        encoded = self.encode(inputs, inputs_mask, inputs_segments)
        start_id = self.config.decoder_start_id
        start = jnp.full_like(targets[:, :1], start_id)
        fed = jnp.concatenate([start, targets[:, :-1]], axis=1)
        if targets_segments is not None:
            fed = jnp.where(layers.starts_of_segments(targets_segments), start_id, fed)
        embedded = self.token_embedder(fed)
        return self.decoder(embedded, encoded, inputs_mask, inputs_segments, targets_segments)

    def prefill(self, inputs: Array, inputs_mask: Array, num_slots: int) -> tuple:
        encoded = self.encode(inputs, inputs_mask)
        batch = inputs.shape[0]
        cache = self.decoder.empty_cache(batch, num_slots)
        state = T5DecodeState(cache, self.decoder.cross_keys_values(encoded), inputs_mask)
        start = jnp.full((batch,), self.config.decoder_start_id, inputs.dtype)
        return self.step(state, start, jnp.zeros((), jnp.int32))

    def step(self, state: T5DecodeState, tokens: Array, slot: Array) -> tuple:
        hidden, state = self.decoder.step(self.token_embedder(tokens[:, None]), state, slot)
        return hidden[:, 0], state

    def __call__(self, inputs: Array, inputs_mask: Array, targets: Array) -> Array:
        """Runs the whole network. Called only to initialise every parameter."""
        hidden = self.hidden_states(inputs, inputs_mask, targets)
        return hidden if self.config.logits_via_embedding else self.decoder.logits_dense(hidden)


@dataclasses.dataclass(frozen=True)
class T5(LinenModel):
    """T5 as pure functions of its parameters; a `LanguageModel`.

    Attributes:
      config: sizes and variants.
    """

    config: T5Config
    # Slot 0 has the start token, so output position 0 is in slot 1.
    _first_slot: ClassVar[int] = 1

    @property
    def module(self) -> Transformer:
        """The Linen module."""
        return Transformer(self.config)

    def _boxed_params(self, key: Key[Array, ""]) -> PyTree:
        tokens = jnp.zeros((1, 1), jnp.int32)
        module = Transformer(dataclasses.replace(self.config, scan_layers=False))
        return module.init(key, tokens, tokens == 0, tokens)["params"]

    def encode(
        self,
        params: Params,
        inputs: Int[Array, "B S"],
        inputs_mask: Bool[Array, "B S"],
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B S D"]:
        """Encodes prompts.

        Args:
          params: the parameters.
          inputs: prompt tokens, with padding at any position.
          inputs_mask: True on real tokens.
          dropout_key: key of the dropout; None turns dropout off.

        Returns:
          Outputs of the encoder in the compute dtype.
        """
        arguments = (inputs, inputs_mask)
        return self._apply(params, Transformer.encode, *arguments, dropout_key=dropout_key)

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Computes the hidden states of all output positions.

        `unembed` maps the hidden states at position t to the logits of `batch.targets[:, t]`. The
        inputs of the decoder are the start token and all targets except the last, so position t
        depends only on the targets before t. In packed rows, no position depends on other examples.

        Args:
          params: the parameters.
          batch: prompts and outputs.
          dropout_key: key of the dropout; None turns dropout off.

        Returns:
          Outputs of the decoder's last norm, after dropout, in the compute dtype.
        """
        arguments = (
            *(batch.inputs, batch.inputs_mask, batch.targets),
            *(batch.inputs_segments, batch.targets_segments),
        )
        return self._apply(params, Transformer.hidden_states, *arguments, dropout_key=dropout_key)

    def head(self, params: Params) -> Params:
        """Returns a tree with the output layer's kernel (T5 1.1) or the embedding (T5 1.0)."""
        if self.config.logits_via_embedding:
            return {"token_embedder": {"embedding": params["token_embedder"]["embedding"]}}
        return {
            "decoder": {"logits_dense": {"kernel": params["decoder"]["logits_dense"]["kernel"]}}
        }

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Computes float32 logits.

        The output layer is a kernel (T5 1.1), or the embedding scaled by 1/sqrt(D) (T5 1.0).
        `params` may contain the output layer for only some vocabulary entries. The logits then
        cover only these entries.
        """
        if not self.config.logits_via_embedding:
            return layers.project(hidden, params["decoder"]["logits_dense"]["kernel"], axis=0)
        embedding = params["token_embedder"]["embedding"]
        return layers.project(hidden, embedding, axis=1, divisor=math.sqrt(self.config.emb_dim))
