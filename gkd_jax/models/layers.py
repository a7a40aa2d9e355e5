"""Layers of T5, and the layers and functions that decoder-only models share with T5.

Parameter names, initialisers and logical axes are the same as in T5X's minimal T5. Parameters are
initialised in float32 and cast where they are used. Parameters restored in bfloat16 therefore work
as well.
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
"""Number added to the attention logits of masked keys. It is finite, as in T5X. A query whose keys
are all masked, such as a query at padding, therefore has uniform attention weights and not NaN."""

NUM_BUCKETS = 32
MAX_DISTANCE = 128

Initializer = Callable[..., Any]
variance_scaling = nn.initializers.variance_scaling


def mask_to_bias(mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Converts a mask, True on keys that may be attended to, to a bias of the attention logits."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)


def same_segment(queries: Int[Array, "B Q"], keys: Int[Array, "B L"]) -> Bool[Array, "B 1 Q L"]:
    """Returns for each pair of query and key whether both belong to the same example of a row."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def starts_of_segments(segments: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Returns whether each position of a packed row is the first of an example or of padding."""
    changes = segments[:, 1:] != segments[:, :-1]
    return jnp.concatenate([jnp.ones_like(changes, shape=(len(segments), 1)), changes], axis=1)


def positions_in_segments(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns the position of each token within its example of a packed row, from 0."""
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
    """Computes float32 logits: hidden states times the output layer, divided by `divisor`.

    Args:
      hidden: hidden states of any dtype.
      kernel: output layer, [D, V] or [V, D].
      axis: index of the kernel's axis D, 0 or 1.
      divisor: number that the product is divided by.
    """
    # bfloat16 operands are not cast. Products of two bfloat16 numbers are exact in float32, and
    # a cast would copy the output layer of a large teacher.
    is_exact = hidden.dtype == kernel.dtype == jnp.bfloat16
    if not is_exact:
        # Divides the hidden states instead of the logits, which are the larger array.
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
      axes: logical axes of the kernel, input axis first.
      dtype: dtype of the computation.
      kernel_init: initialiser of the kernel.
      use_bias: whether a learned bias is added; False in T5.
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
    """Dropout. If there is a dropout key, sets some values to 0 and divides the others by 1 - rate.

    Attributes:
      rate: probability that a value is set to 0.
      shared_over_positions: whether the mask is the same for all positions (the second-to-last
        axis), as in T5X.
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
    """T5's layer norm, x / rms(x) · scale, without mean and bias.

    x / rms(x) is computed in float32, and the product with the scale in `dtype`.
    """

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
        # The gather precedes the cast. Therefore no copy of the table in the compute dtype is made,
        # and the table's gradient is summed in float32. GSPMD can partition the gather if the table
        # is sharded over the vocabulary. An id outside the table gives NaN instead of another row.
        rows = jnp.take(table, tokens, axis=0, mode="fill").astype(self.dtype)
        return nn.with_logical_constraint(rows, ("batch", "length", None))


class GatedMLP(nn.Module):
    """Feed-forward block: wo(activation_0(wi_0 x) * activation_1(wi_1 x) * ...)."""

    mlp_dim: int
    features: int
    activations: tuple[str, ...]
    dropout_rate: float
    dtype: Any

    def setup(self) -> None:
        single = len(self.activations) == 1
        # Named as in T5X: `wi` if there is one activation, otherwise `wi_0`, `wi_1`, ...
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
    """Multi-head attention whose logits are not scaled by 1/sqrt(head_dim).

    The factor is in the initialiser of the query projection instead. Keys and values are computed
    by a separate method, so that decoding can cache them. Their shape is [B, H, L, K]. The batch is
    the first axis, as in every array of a decoding state. The keys of each head are contiguous,
    which suits the matrix products of a decode step.
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
        # Attention weights are [B, H, Q, L], so the dropout mask is shared by all queries.
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
        # Biases that broadcast over different axes are separate arguments. Their sum is as large as
        # the logits, so it is computed only here.
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

    If `bidirectional`, keys before and after the query have separate halves of the buckets.
    Otherwise keys before the query have all buckets, and keys after the query are in bucket 0. In
    each direction, half of the buckets contain one distance each. The widths of the other buckets
    grow exponentially up to MAX_DISTANCE. Larger distances are in the last bucket.

    Args:
      distances: distances as a NumPy array, known at trace time.
      bidirectional: whether keys after the query are attended to; True in the encoder.

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
    # The epsilon, as in T5X, puts a distance on the border between two buckets into the upper one.
    ratio = np.log(np.maximum(behind, 1) / exact + np.finfo(np.float32).eps)
    ratio = ratio / math.log(MAX_DISTANCE / exact)
    grown = np.minimum(exact + np.trunc(ratio * (num_buckets - exact)), num_buckets - 1)
    return (offset + np.where(behind < exact, behind, grown)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Learned attention bias of each head, which depends on the distance between key and query."""

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
        """Returns the float32 biases of all pairs of query and key.

        Each row of the matrix is the previous row shifted by one. To build these rows, the values
        of all distances are repeated with period P and reshaped to rows of length P - 1. The
        gradient of this reshape is a sum, while the gradient of a gather would be a scatter.
        """
        ahead, behind = np.arange(key_length), np.arange(1 - query_length, 0)
        # The value of distance d is at index d modulo P. One filler entry ensures that
        # P - 1 >= key_length.
        period = self._values(np.concatenate([ahead, [0], behind]))  # [H, P]
        row_length = period.shape[1] - 1
        rows = jnp.tile(period, (1, query_length))[:, : query_length * row_length]
        rows = rows.reshape(self.num_heads, query_length, row_length)
        return rows[None, :, :, :key_length]

    def row(self, position: Int[Array, ""], key_length: int) -> Float[Array, "1 H 1 L"]:
        """Returns the float32 biases of a single query at `position`, which may be traced."""
        values = self._values(np.arange(1 - key_length, key_length))
        start = key_length - 1 - position
        return lax.dynamic_slice_in_dim(values, start, key_length, axis=1)[None, :, None]
