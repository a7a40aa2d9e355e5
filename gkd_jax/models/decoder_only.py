"""Decoder-only models: Llama, Mistral, Qwen, Gemma and SmolLM3 as settings of one network.

Llama: arXiv 2302.13971, 2307.09288, 2407.21783. Qwen: 2407.10671, 2505.09388. Gemma: 2408.00118,
2503.19786.

Prompt and output are in one row of S + T slots. The first output token is always in slot S, even if
the prompt is shorter than S. Padding between prompt and output is masked out and not counted in
positions. Prompts may therefore be padded on the right (or anywhere), and no row has to be shifted.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.models import layers, rope
from gkd_jax.models.decoder_config import DecoderConfig, is_rotated, is_sliding
from gkd_jax.models.layer_loops import Index, extend_cache, make_layers, run_layers
from gkd_jax.models.linen import LinenModel

KeysValues = tuple[Float[Array, "B H L K"], Float[Array, "B H L K"]]
Rotation = tuple[Array, Array] | None
"""Cosines and sines of the rotary embedding; None for layers without rotary embedding."""


@flax.struct.dataclass
class DecoderState:
    """The state of decoding between steps. The first axis of every array is the batch.

    Attributes:
      cache: keys and values, in a tuple with one entry per layer, or in arrays with the layers as
        their second axis. The prompt is in slots 0 to S - 1, output position t in slot S + t.
      inputs_mask: True on the real tokens of the prompt.
    """

    cache: tuple[KeysValues, ...] | KeysValues
    inputs_mask: Bool[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class PositionTables:
    """Rotations and attention biases of given positions, computed once for all layers.

    Attributes:
      rotation: cosines and sines for each kind of layer.
      bias: bias of the attention logits for each kind of layer, [B, 1, Q, L].
    """

    rotation: dict[str, Rotation]
    bias: dict[str, Array]

    def at(self, kind: str) -> tuple[Rotation, Array]:
        """Returns the rotation and the bias of layers of this kind."""
        return self.rotation[kind], self.bias[kind]


def make_position_tables(
    config: DecoderConfig,
    positions: Int[Array, "B Q"],
    key_positions: Int[Array, "B L"],
    is_key: Bool[Array, "B L"],
    segments: Int[Array, "B L"] | None = None,
) -> PositionTables:
    """Computes rotations and causal attention biases for each kind of layer in the configuration.

    A query attends to keys at its own and at earlier positions. In sliding layers, the keys must
    also be within the window.

    Args:
      config: configuration of the model.
      positions: positions of the queries.
      key_positions: positions of the keys.
      is_key: True on keys that may be attended to, False on padding and on empty slots.
      segments: for packed rows, the number of the example that each query and key belongs to, 0
        for padding. A query attends only to keys of its own example.
    """
    distance = positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & is_key[:, None, :]
    if segments is not None:
        seen &= layers.same_segment(segments, segments)[:, 0]
    rotation, bias = {}, {}
    for kind in sorted(set(config.layer_kinds)):
        one, within = config.rope, seen
        if is_sliding(kind):
            assert config.sliding_window is not None
            one = config.sliding_rope or config.rope
            within = seen & (distance < config.sliding_window)
        rotation[kind] = (
            rope.rotations(one, config.head_dim, positions) if is_rotated(kind) else None
        )
        bias[kind] = layers.mask_to_bias(within[:, None])
    return PositionTables(rotation, bias)


class ScaledNorm(nn.Module):
    """RMSNorm in float32. `norm_scale_offset` is added to its learned scale."""

    config: DecoderConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        offset = self.config.norm_scale_offset
        start = nn.initializers.zeros if offset else nn.initializers.ones
        scale = layers.logical_param(self, "scale", start, (self.axis,), (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
        normed = x * lax.rsqrt(mean_square + self.config.norm_epsilon)
        scale = offset + jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (normed * scale).astype(self.config.dtype)


class GroupedAttention(nn.Module):
    """Attention in which each head of keys and values is shared by a group of query heads."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config

        def project(num_heads: int) -> layers.Dense:
            features = num_heads * config.head_dim
            axes = ("embed", "joined_kv")
            return layers.Dense(features, axes, config.dtype, use_bias=config.attention_bias)

        self.query = project(config.num_heads)
        self.key = project(config.num_kv_heads)
        self.value = project(config.num_kv_heads)
        self.out = layers.Dense(
            config.emb_dim, ("joined_kv", "embed"), config.dtype,
            use_bias=config.attention_out_bias,
        )  # fmt: skip
        if config.qk_norm:
            self.query_norm = ScaledNorm(config, axis="kv")
            self.key_norm = ScaledNorm(config, axis="kv")

    def _split_heads(self, x: Array) -> Array:
        x = x.reshape(*x.shape[:2], -1, self.config.head_dim)  # [B, L, H, K]
        x = jnp.swapaxes(x, 1, 2)  # [B, H, L, K]
        return nn.with_logical_constraint(x, ("batch", "heads", "length", "kv"))

    def keys_values(self, x: Float[Array, "B L D"], rotation: Rotation) -> KeysValues:
        """Returns the keys, which are rotated, and the values, which are not."""
        keys = self._split_heads(self.key(x))
        if self.config.qk_norm:
            keys = self.key_norm(keys)
        return rope.rotate(keys, rotation), self._split_heads(self.value(x))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        keys: Float[Array, "B H L K"],
        values: Float[Array, "B H L K"],
        rotation: Rotation,
        bias: Float[Array, "B 1 Q L"],
    ) -> Float[Array, "B Q D"]:
        config = self.config
        queries = self._split_heads(self.query(x))
        if config.qk_norm:
            queries = self.query_norm(queries)
        queries = rope.rotate(queries, rotation)
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        # Queries are grouped by key head, [B, key heads, query heads per key head, Q, K], so that
        # keys need not be repeated.
        grouped = queries.reshape(queries.shape[0], config.num_kv_heads, -1, *queries.shape[2:])
        logits = jnp.einsum("bngqk,bnlk->bngql", grouped, keys, preferred_element_type=jnp.float32)
        logits = layers.soft_cap(logits * scale, config.attention_soft_cap)
        weights = jax.nn.softmax(logits + bias[:, :, None], axis=-1).astype(config.dtype)
        context = jnp.einsum("bngql,bnlk->bngqk", weights, values)
        context = context.reshape(queries.shape)
        context = jnp.swapaxes(context, 1, 2)  # [B, Q, H, K]
        return self.out(context.reshape(*x.shape[:2], -1))


class GatedBlock(nn.Module):
    """Gated feed-forward block: wo(activation(wi_0 x) * wi_1 x)."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config

        def dense(features: int, axes: tuple[str, str]) -> layers.Dense:
            return layers.Dense(features, axes, config.dtype, use_bias=config.mlp_bias)

        self.wi_0 = dense(config.mlp_dim, ("embed", "mlp"))
        self.wi_1 = dense(config.mlp_dim, ("embed", "mlp"))
        self.wo = dense(config.emb_dim, ("mlp", "embed"))

    def __call__(self, x: Array) -> Array:
        activation: Callable[[Array], Array] = {
            "silu": jax.nn.silu,
            "gelu_tanh": lambda y: jax.nn.gelu(y, approximate=True),
            "gelu": lambda y: jax.nn.gelu(y, approximate=False),
        }[self.config.mlp_activation]
        hidden = activation(self.wi_0(x)) * self.wi_1(x)
        return self.wo(nn.with_logical_constraint(hidden, ("batch", "length", "mlp")))


class DecoderLayer(nn.Module):
    """Causal attention, then the feed-forward block."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.pre_attention_norm = ScaledNorm(config)
        self.attention = GroupedAttention(config)
        self.pre_mlp_norm = ScaledNorm(config)
        self.mlp = GatedBlock(config)
        self.dropout = layers.Dropout(config.dropout_rate)
        if config.post_norms:
            self.post_attention_norm = ScaledNorm(config)
            self.post_mlp_norm = ScaledNorm(config)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        rotation: Rotation,
        bias: Float[Array, "B 1 Q L"],
        keep: Callable[[KeysValues], tuple[KeysValues, PyTree]] = lambda new: (new, new),
    ) -> tuple[Float[Array, "B Q D"], PyTree]:
        """Computes the layer, for a whole row or for one decode step.

        Args:
          x: hidden states.
          rotation: cosines and sines of the positions of `x`.
          bias: bias of the attention logits.
          keep: function of the keys and values of `x`. It returns all keys and values that `x`
            attends to, and a second output of the layer, such as the updated cache.

        Returns:
          The new hidden states, and the second output of `keep`.
        """
        y = self.pre_attention_norm(x)
        (keys, values), kept = keep(self.attention.keys_values(y, rotation))
        y = self.attention(y, keys, values, rotation, bias)
        if self.config.post_norms:
            y = self.post_attention_norm(y)
        x = x + self.dropout(y)
        y = self.mlp(self.pre_mlp_norm(x))
        if self.config.post_norms:
            y = self.post_mlp_norm(y)
        return x + self.dropout(y), kept


class Decoder(nn.Module):
    """The Linen module, which defines the parameter tree and the computations."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        std = config.emb_dim**-0.5 if config.scale_embeddings else 0.02
        self.token_embedder = layers.Embed(
            config.vocab_size, config.emb_dim, config.dtype, nn.initializers.normal(std)
        )
        self.layers = make_layers(
            lambda: DecoderLayer(config), len(config.layer_kinds), stacked=config.scan_layers
        )
        self.decoder_norm = ScaledNorm(config)
        self.dropout = layers.Dropout(config.dropout_rate)
        if not config.tie_embeddings:
            self.logits_dense = layers.Dense(config.vocab_size, ("embed", "vocab"), "float32")

    def _embed(self, tokens: Array) -> Array:
        x = self.token_embedder(tokens)
        if self.config.scale_embeddings:
            # The factor is rounded to the compute dtype, as in the code of the released models.
            x = x * jnp.asarray(math.sqrt(self.config.emb_dim), x.dtype)
        return self.dropout(x)

    def row(self, tokens: Array, mask: Array, *, with_cache: bool) -> tuple[Array, PyTree]:
        """Computes the hidden states of all tokens; if `with_cache`, also their keys and values."""
        positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
        tables = make_position_tables(self.config, positions, positions, mask)
        return self._run_row(tables, tokens, with_cache=with_cache)

    def _run_row(
        self, tables: PositionTables, tokens: Array, *, with_cache: bool
    ) -> tuple[Array, PyTree]:
        config = self.config

        def body(layer: DecoderLayer, x: Array, number: Index, kind: str) -> tuple[Array, PyTree]:
            x, keys_values = layer(x, *tables.at(kind))
            return x, keys_values if with_cache else None

        # Nothing is rematerialised if there is a cache, since decoding has no backward pass.
        policy = "none" if with_cache else config.remat_policy
        return self._run(body, self._embed(tokens), remat_policy=policy)

    def _run(self, body: Any, carry: Any, **options: Any) -> tuple[Any, Any]:
        return run_layers(self.layers, body, carry, kinds=self.config.layer_kinds, **options)

    def hidden_states(self, inputs: Array, inputs_mask: Array, targets: Array) -> Array:
        fed = targets[:, :-1]
        tokens = jnp.concatenate([inputs, fed], axis=1)
        mask = jnp.concatenate([inputs_mask, jnp.ones_like(fed, bool)], axis=1)
        x, _ = self.row(tokens, mask, with_cache=False)
        first = take_last(x[:, : inputs.shape[1]], inputs_mask)
        x = jnp.concatenate([first[:, None], x[:, inputs.shape[1] :]], axis=1)
        return self.dropout(self.decoder_norm(x))

    def packed_hidden_states(
        self, inputs: Array, targets: Array, inputs_segments: Array, targets_segments: Array
    ) -> Array:
        """Computes `hidden_states` of packed rows, in which positions restart with each example."""
        num_inputs, num_outputs = inputs.shape[1], targets.shape[1]
        # [B, T, S]: whether prompt slot s and output position t belong to the same example.
        is_prompt = targets_segments[:, :, None] == inputs_segments[:, None, :]
        lengths = jnp.sum(is_prompt, axis=2, dtype=jnp.int32)
        output_positions = layers.positions_in_segments(targets_segments)
        positions = jnp.concatenate(
            [layers.positions_in_segments(inputs_segments), lengths + output_positions], axis=1
        )[:, :-1]
        segments = jnp.concatenate([inputs_segments, targets_segments], axis=1)[:, :-1]
        tokens = jnp.concatenate([inputs, targets], axis=1)[:, :-1]
        tables = make_position_tables(self.config, positions, positions, segments > 0, segments)
        x, _ = self._run_row(tables, tokens, with_cache=False)
        # The first token of an output is predicted at the last token of its prompt. Every other
        # token is predicted at the slot before its own.
        last_of_prompt = num_inputs - 1 - jnp.argmax(is_prompt[:, :, ::-1], axis=2)
        before = jnp.arange(num_inputs - 1, num_inputs - 1 + num_outputs)[None]
        previous = jnp.where(output_positions == 0, last_of_prompt, before)
        x = jnp.take_along_axis(x, previous[:, :, None], axis=1)
        return self.dropout(self.decoder_norm(x))

    def prefill(self, inputs: Array, inputs_mask: Array, max_length: int) -> tuple:
        x, cache = self.row(inputs, inputs_mask, with_cache=True)

        def with_room(array: Array) -> Array:
            # The last output token is never fed to the model, so it needs no slot.
            room = [(0, 0)] * (array.ndim - 2) + [(0, max_length - 1), (0, 0)]
            return jnp.pad(array, room)

        state = DecoderState(jax.tree.map(with_room, cache), inputs_mask)
        return self.decoder_norm(take_last(x, inputs_mask)), state

    def step(self, state: DecoderState, tokens: Array, index: Array) -> tuple:
        mask = state.inputs_mask
        num_inputs = mask.shape[1]
        num_outputs = jax.tree.leaves(state.cache)[0].shape[-2] - num_inputs
        lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)[:, None]
        outputs = jnp.arange(num_outputs)[None]
        key_positions = jnp.concatenate(
            [jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, lengths + outputs], axis=1
        )
        is_key = jnp.concatenate(
            [mask, jnp.broadcast_to(outputs <= index, (mask.shape[0], num_outputs))], axis=1
        )
        tables = make_position_tables(self.config, lengths + index, key_positions, is_key)
        slot = num_inputs + index

        def body(layer: DecoderLayer, carry: tuple, number: Index, kind: str) -> tuple[tuple, None]:
            x, cache = carry

            def keep(new: KeysValues) -> tuple[KeysValues, PyTree]:
                return extend_cache(cache, new, number, slot)

            return layer(x, *tables.at(kind), keep), None

        (x, cache), _ = self._run(body, (self._embed(tokens[:, None]), state.cache))
        return self.decoder_norm(x)[:, 0], dataclasses.replace(state, cache=cache)

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Runs the whole network. Called only to initialise every parameter."""
        hidden = self.decoder_norm(self.row(tokens, mask, with_cache=False)[0])
        return hidden if self.config.tie_embeddings else self.logits_dense(hidden)


def take_last(x: Float[Array, "B S D"], mask: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """Returns the hidden states of the last real token in each row."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class DecoderOnly(LinenModel):
    """A decoder-only model as pure functions of its parameters; a `LanguageModel`.

    Attributes:
      config: sizes and variants.
    """

    config: DecoderConfig

    @property
    def module(self) -> Decoder:
        """The Linen module."""
        return Decoder(self.config)

    def _boxed_params(self, key: Key[Array, ""]) -> PyTree:
        tokens = jnp.zeros((1, 1), jnp.int32)
        module = Decoder(dataclasses.replace(self.config, scan_layers=False))
        return module.init(key, tokens, tokens == 0)["params"]

    def hidden_states(
        self, params: Params, batch: Batch, *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Computes the hidden states of all output positions.

        `unembed` maps the hidden states at position t to the logits of `batch.targets[:, t]`. The
        first output token is predicted at the last token of the prompt, so every prompt must have
        at least one token.
        """
        arguments: tuple[Array, ...] = (batch.inputs, batch.inputs_mask, batch.targets)
        method: Callable[..., Any] = Decoder.hidden_states
        if batch.inputs_segments is not None and batch.targets_segments is not None:
            method = Decoder.packed_hidden_states
            segments = (batch.inputs_segments, batch.targets_segments)
            arguments = (batch.inputs, batch.targets, *segments)
        return self._apply(params, method, *arguments, dropout_key=dropout_key)

    def head(self, params: Params) -> Params:
        """Returns a tree with the kernel of the output layer, or with the tied embedding."""
        if self.config.tie_embeddings:
            return {"token_embedder": {"embedding": params["token_embedder"]["embedding"]}}
        return {"logits_dense": {"kernel": params["logits_dense"]["kernel"]}}

    def unembed(self, params: Params, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Computes float32 logits, with the final soft cap.

        `params` may contain the output layer for only some vocabulary entries. The logits then
        cover only these entries.
        """
        if self.config.tie_embeddings:
            logits = layers.project(hidden, params["token_embedder"]["embedding"], axis=1)
        else:
            logits = layers.project(hidden, params["logits_dense"]["kernel"], axis=0)
        return layers.soft_cap(logits, self.config.final_soft_cap)
