"""Layers of T5, and functions and layers that decoder-only models share with it.

Parameter names, initialisers and logical axes are those of T5X's minimal T5. Parameters are
initialised in float32 and cast where they are used, so that parameters restored in bfloat16 work,
too.
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
"""Added to the attention logits of masked keys. It is finite, as in T5X, so that the attention of a
query without keys (a padded one) is uniform instead of NaN."""

NUM_BUCKETS = 32
MAX_DISTANCE = 128

Initializer = Callable[..., Any]
variance_scaling = nn.initializers.variance_scaling


def mask_to_bias(mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Converts a mask, True on keys that may be seen, to a bias of the attention logits."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)


def same_segment(queries: Int[Array, "B Q"], keys: Int[Array, "B L"]) -> Bool[Array, "B 1 Q L"]:
    """Returns whether query and key belong to the same example of a packed row."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def starts_of_segments(segments: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Returns whether a position is the first of an example of a packed row, or of the padding."""
    changes = segments[:, 1:] != segments[:, :-1]
    return jnp.concatenate([jnp.ones_like(changes, shape=(len(segments), 1)), changes], axis=1)


def positions_in_segments(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns positions within each example of a packed row, from 0."""
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
    """Declares a float32 parameter with logical axes, and returns the array."""
    boxed_init = nn.with_logical_partitioning(initializer, axes)
    return cast(Array, module.param(name, boxed_init, shape, jnp.float32))


def soft_cap(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Returns cap * tanh(logits / cap), or the logits unchanged if `cap` is None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def project(
    hidden: Float[Array, "*n D"], kernel: Array, *, axis: int, divisor: float = 1.0
) -> Float[Array, "*n V"]:
    """Computes logits in float32: hidden states times an output layer, divided by `divisor`.

    Args:
      hidden: hidden states of any dtype.
      kernel: output layer, [D, V] or [V, D].
      axis: axis D of the kernel.
      divisor: divisor of the product.
    """
    # If both are bfloat16 they are not cast: products are exact in float32, and the output layer
    # of a large teacher is not copied.
    is_exact = hidden.dtype == kernel.dtype == jnp.bfloat16
    if not is_exact:
        # Hidden states are divided, since there are fewer of them than of logits.
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
      axes: logical axes of the kernel: of the input, then of the output.
      dtype: dtype of the computation.
      kernel_init: initialiser of the kernel.
      use_bias: whether a learned bias is added; T5 has none.
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
    """Sets a share of the values to 0 and scales up the others, if there is a dropout key.

    Attributes:
      rate: expected share of values that are set to 0.
      shared_over_positions: whether the mask is the same for all indices of the second-to-last
        axis, as in T5X.
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
    """T5's layer norm: x / rms(x) · scale, without mean and bias; float32 except for the scale."""

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
    """Token embedding. In T5 it is initialised from the standard normal distribution."""

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
        # The gather precedes the cast, so that the table is not copied in the compute dtype and its
        # gradient is summed in float32. GSPMD partitions a gather from a table that is sharded over
        # the vocabulary. An id outside the table gives NaN, not another row.
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
        # T5X's names: `wi` if there is one activation, otherwise `wi_0`, `wi_1`, ...
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

    Keys and values are computed by a separate method, so that decoding can cache them. Their shape
    is [B, H, L, K]: the batch first, as a decoding state needs it, and the keys of each head
    contiguous, as the matrix products of a decode step need them.
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
        # Over [B, H, Q, L]: the mask of a key is the same for all queries.
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
        # Biases that broadcast over different axes are separate arguments: their sum is as large
        # as the logits, and is computed only here.
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

    Half of the buckets hold one distance each; the other half grow exponentially up to
    MAX_DISTANCE, and larger distances are in the last bucket. If bidirectional, each direction has
    half of the buckets; otherwise every key after the query is in bucket 0.

    Args:
      distances: distances, which are known when tracing.
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
    # The epsilon, as in T5X, puts a distance at the border of two buckets in the upper one.
    ratio = np.log(np.maximum(behind, 1) / exact + np.finfo(np.float32).eps)
    ratio = ratio / math.log(MAX_DISTANCE / exact)
    grown = np.minimum(exact + np.trunc(ratio * (num_buckets - exact)), num_buckets - 1)
    return (offset + np.where(behind < exact, behind, grown)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Attention bias of each head that depends on the distance of key and query."""

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

        Each row is the previous row, shifted by one. Repeating values of period P and reshaping
        them to rows of P - 1 gives these shifts, and their gradient is a sum, while that of a
        gather of all pairs would be a scatter.
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
