"""Layers of T5, with the parameter names, initialisers and logical axes of T5X's minimal T5.

Raffel et al. 2020 (https://arxiv.org/abs/1910.10683). Parameters are float32 at the start and
are cast where they are used, so a tree restored in bfloat16 works as well.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from gkd_jax.common.array_types import Array, Bool, Float, Int
from gkd_jax.models.layer_loops import key_of_layer

MASKED = -1e10
"""Added to the attention logits of what may not be seen. Finite, as in T5X: a row that sees
nothing (a padded query) is uniform instead of NaN."""

NUM_BUCKETS = 32
MAX_DISTANCE = 128

Initializer = Callable[..., Any]
variance_scaling = nn.initializers.variance_scaling


def mask_to_bias(mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Turns a mask, True where attention may go, into what is added to the logits."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)


def same_segment(queries: Int[Array, "B Q"], keys: Int[Array, "B L"]) -> Bool[Array, "B 1 Q L"]:
    """True where query and key are of one example of a packed row, for all heads."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def starts_of_segments(segments: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """True at the first position of each example of a packed row, and of its padding."""
    changes = segments[:, 1:] != segments[:, :-1]
    return jnp.concatenate([jnp.ones_like(changes, shape=(len(segments), 1)), changes], axis=1)


def places_in_segments(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Counts positions from 0 on within each example of a packed row."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    starts = jnp.where(starts_of_segments(segments), index, 0)
    return index - lax.cummax(starts, axis=1)


def logical_param(
    module: nn.Module,
    name: str,
    initializer: Initializer,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
) -> Array:
    """Declares a float32 parameter with logical axes; returns it without their box."""
    boxed_init = nn.with_logical_partitioning(initializer, axes)
    return cast(Array, module.param(name, boxed_init, shape, jnp.float32))


def soft_cap(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap * tanh(logits / cap), which keeps logits within the cap; None leaves them."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def project(
    hidden: Float[Array, "*n D"], kernel: Array, *, axis: int, divisor: float = 1.0
) -> Float[Array, "*n V"]:
    """Hidden states times an output layer, in float32, over `divisor`.

    Args:
      hidden: of any dtype.
      kernel: [D, V] or [V, D].
      axis: that of the kernel which is D.
      divisor: of the product.
    """
    # Two bfloat16 operands stay so: their products are exact in float32, and a large teacher's
    # head is not copied.
    is_exact = hidden.dtype == kernel.dtype == jnp.bfloat16
    if not is_exact:
        # Divided here, where there are fewer numbers than there will be logits.
        hidden, kernel = hidden.astype(jnp.float32) / divisor, kernel.astype(jnp.float32)
    logits = lax.dot_general(
        hidden,
        kernel,
        (((hidden.ndim - 1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return logits / divisor if is_exact else logits


class Dense(nn.Module):
    """Matrix product in `dtype`.

    Attributes:
      features: size of the output.
      axes: logical axes of the kernel, input first.
      dtype: compute dtype.
      kernel_init: initialiser of the kernel.
      use_bias: whether a learnt bias is added; T5 has none.
    """

    features: int
    axes: tuple[str, str]
    dtype: Any
    kernel_init: Initializer = variance_scaling(1.0, "fan_in", "truncated_normal")
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        kernel = logical_param(self, "kernel", self.kernel_init, self.axes, shape)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = logical_param(self, "bias", nn.initializers.zeros, self.axes[1:], shape[1:])
        return y + jnp.expand_dims(bias.astype(self.dtype), tuple(range(y.ndim - 1)))


class Dropout(nn.Module):
    """Zeroes a share of the values and scales up the others, where there is a dropout key.

    Attributes:
      rate: share of the values.
      shared_over_positions: one coin for all of the last axis but one, as T5X has it.
    """

    rate: float
    shared_over_positions: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        shape = (*x.shape[:-2], 1, x.shape[-1]) if self.shared_over_positions else x.shape
        key = key_of_layer(self.make_rng("dropout"))
        keep = jax.random.bernoulli(key, 1.0 - self.rate, shape)
        return jnp.where(keep, x / (1.0 - self.rate), 0.0).astype(x.dtype)


class RMSNorm(nn.Module):
    """T5's layer norm: x / rms(x) · scale, in float32 up to the scale, no mean and no bias."""

    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = logical_param(self, "scale", nn.initializers.ones, ("embed",), (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
        normed = (x * lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
        scale = scale.astype(self.dtype)
        return normed * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


class Embed(nn.Module):
    """Token embedding: rows of a table, of standard normals in T5."""

    vocab_size: int
    features: int
    dtype: Any
    embedding_init: Initializer = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        table = logical_param(
            self,
            "embedding",
            self.embedding_init,
            ("vocab", "embed"),
            (self.vocab_size, self.features),
        )
        # Gather before the cast: the table is not copied to the compute dtype, and its
        # gradient is summed in float32. GSPMD splits a gather over a vocab-sharded table. An
        # id outside of the table gives NaN, not a neighbour's row.
        rows = jnp.take(table, tokens, axis=0, mode="fill").astype(self.dtype)
        return nn.with_logical_constraint(rows, ("batch", "length", None))


class GatedMLP(nn.Module):
    """Feed-forward block: the product of one projection per activation, then `wo`."""

    mlp_dim: int
    features: int
    activations: tuple[str, ...]
    dropout_rate: float
    dtype: Any

    def setup(self) -> None:
        single = len(self.activations) == 1
        # T5X's names: `wi` where there is one activation, otherwise `wi_0`, `wi_1`, ...
        for index in range(len(self.activations)):
            dense = Dense(self.mlp_dim, ("embed", "mlp"), self.dtype)
            setattr(self, "wi" if single else f"wi_{index}", dense)
        self.wo = Dense(self.features, ("mlp", "embed"), self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def __call__(self, x: Array) -> Array:
        single = len(self.activations) == 1
        branches = []
        for index, activation in enumerate(self.activations):
            branch = getattr(self, "wi" if single else f"wi_{index}")(x)
            branches.append(branch if activation == "linear" else getattr(nn, activation)(branch))
        hidden = self.dropout(functools.reduce(operator.mul, branches))
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        return self.wo(hidden)


class Attention(nn.Module):
    """Multi-head attention without scaling: 1/sqrt(head_dim) is in the query's initialiser.

    Keys and values are made apart from the attention itself, so that decoding can keep them.
    Heads come before lengths, [B, H, L, K]: with the batch first, as caches need it, and each
    head's keys in one block, as the matrix products of a decode step need it.
    """

    num_heads: int
    head_dim: int
    features: int
    dropout_rate: float
    dtype: Any

    def setup(self) -> None:
        kernel_init = variance_scaling(1.0, "fan_in", "normal")

        def query_init(*args: Any) -> Array:
            return kernel_init(*args) / math.sqrt(self.head_dim)

        joined = self.num_heads * self.head_dim
        project = functools.partial(Dense, joined, ("embed", "joined_kv"), self.dtype)
        self.query = project(query_init)
        self.key = project(kernel_init)
        self.value = project(kernel_init)
        self.out = Dense(self.features, ("joined_kv", "embed"), self.dtype, kernel_init)
        # Over [B, H, Q, L]: one coin for each key, shared by all queries.
        self.dropout = Dropout(self.dropout_rate)

    def _split_heads(self, x: Array) -> Array:
        x = x.reshape(*x.shape[:2], self.num_heads, self.head_dim)  # [B, L, H, K]
        x = jnp.swapaxes(x, 1, 2)  # [B, H, L, K]
        return nn.with_logical_constraint(x, ("batch", "heads", "length", "kv"))

    def keys_values(self, x: Float[Array, "B L D"]) -> tuple[Array, Array]:
        """Returns keys and values, both [B, H, L, K]."""
        return self._split_heads(self.key(x)), self._split_heads(self.value(x))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        keys: Float[Array, "B H L K"],
        values: Float[Array, "B H L K"],
        *biases: Float[Array, "#B #H #Q L"],
    ) -> Float[Array, "B Q D"]:
        queries = self._split_heads(self.query(x))
        logits = jnp.einsum("bhqk,bhlk->bhql", queries, keys, preferred_element_type=jnp.float32)
        # Biases of different axes come apart: their sum would be as large as the logits, and is
        # made only where it is added.
        bias = functools.reduce(operator.add, biases)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(self.dtype)
        weights = self.dropout(weights)
        context = jnp.einsum("bhql,bhlk->bhqk", weights, values)
        context = jnp.swapaxes(context, 1, 2)  # [B, Q, H, K]
        return self.out(context.reshape(*x.shape[:2], self.num_heads * self.head_dim))


def relative_position_buckets(
    distances: Int[np.ndarray, " N"], *, bidirectional: bool
) -> Int[np.ndarray, " N"]:
    """Maps distances (key position minus query position) to T5's buckets.

    Half of the buckets hold one distance each, the other half grow by powers up to
    MAX_DISTANCE, beyond which all share the last one. In both directions, each direction has
    half of the buckets; in one, every key after the query is in bucket 0.

    Args:
      distances: known when tracing.
      bidirectional: True in the encoder.

    Returns:
      Buckets, int32, in [0, NUM_BUCKETS).
    """
    num_buckets = NUM_BUCKETS
    offset = np.zeros_like(distances)
    behind = -distances
    if bidirectional:
        num_buckets //= 2
        offset = np.where(behind < 0, num_buckets, 0)
        behind = np.abs(behind)
    behind = np.maximum(behind, 0)
    exact = num_buckets // 2
    # The epsilon (T5X's) keeps a distance on the border of two buckets in the upper one.
    ratio = np.log(np.maximum(behind, 1) / exact + np.finfo(np.float32).eps)
    ratio = ratio / math.log(MAX_DISTANCE / exact)
    grown = np.minimum(exact + np.trunc(ratio * (num_buckets - exact)), num_buckets - 1)
    return (offset + np.where(behind < exact, behind, grown)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Attention bias per head that depends on the distance of key and query."""

    num_heads: int
    bidirectional: bool

    def setup(self) -> None:
        self.rel_embedding = logical_param(
            self,
            "rel_embedding",
            variance_scaling(1.0, "fan_avg", "uniform"),
            ("heads", "relpos_buckets"),
            (self.num_heads, NUM_BUCKETS),
        )

    def _values(self, distances: Int[np.ndarray, " N"]) -> Float[Array, "H N"]:
        buckets = relative_position_buckets(distances, bidirectional=self.bidirectional)
        return jnp.take(self.rel_embedding.astype(jnp.float32), buckets, axis=1)

    def __call__(self, query_length: int, key_length: int) -> Float[Array, "1 H Q L"]:
        """Returns the biases of all pairs of positions, float32.

        Each row is the row before it, shifted by one. Repeating values of period P and reading
        them back in rows of P - 1 gives just these shifts, whose gradient is a sum where that
        of a gather of all pairs would be a scatter.
        """
        ahead, behind = np.arange(key_length), np.arange(1 - query_length, 0)
        # Row q reads distance d at index d modulo P; one filler makes P - 1 >= key_length.
        period = self._values(np.concatenate([ahead, [0], behind]))  # [H, P]
        row_length = period.shape[1] - 1
        rows = jnp.tile(period, (1, query_length))[:, : query_length * row_length]
        rows = rows.reshape(self.num_heads, query_length, row_length)
        return rows[None, :, :, :key_length]

    def row(self, position: Int[Array, ""], key_length: int) -> Float[Array, "1 H 1 L"]:
        """Returns the biases of the one query at `position`, which may be traced, float32."""
        values = self._values(np.arange(1 - key_length, key_length))
        start = key_length - 1 - position
        return lax.dynamic_slice_in_dim(values, start, key_length, axis=1)[None, :, None]
