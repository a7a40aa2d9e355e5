"""Rotary position embeddings and their scaling to longer contexts.

"RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864. The kinds of
scaling are described in `decoder_config.Rope`.
"""

import math

import jax.numpy as jnp
import numpy as np

from gkd_jax.common.array_types import Array, Float, Int
from gkd_jax.models.decoder_config import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[Float[np.ndarray, " K/2"], float]:
    """Computes the frequency of each pair of dimensions, and the scale of queries and keys.

    Args:
      rope: base and scaling.
      head_dim: width of a head, K.

    Returns:
      The rotation of each pair from one position to the next, in radians and float32; and the
      scale, which is 1.0 except for YaRN.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1.0) / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        scale = rope.attention_factor
        if scale is None:
            scale = 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
        return _yarn(rope, plain, head_dim), scale
    return plain, 1.0


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Scales long wavelengths, keeps short ones, and interpolates between both (Llama 3.1)."""
    wavelengths = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    share = (rope.original_length / wavelengths - low) / (high - low)
    share = np.clip(share, 0.0, 1.0)
    return ((1 - share) * plain / rope.factor + share * plain).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Scales slowly rotating dimensions, keeps fast ones, and interpolates between them (YaRN).

    Whether a dimension is slow or fast depends on the number of its rotations within the original
    context length, see `Rope.beta_slow` and `Rope.beta_fast`.
    """

    def dimension(turns: float) -> float:
        wavelength = rope.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = max(last - first, 0.001)  # As in YaRN's code; avoids a division by 0.
    stretched = np.clip((np.arange(head_dim // 2) - first) / width, 0.0, 1.0)
    return (stretched * plain / rope.factor + (1 - stretched) * plain).astype(np.float32)


def rotations(
    rope: Rope, head_dim: int, positions: Int[Array, "B L"]
) -> tuple[Float[Array, "B 1 L K/2"], Float[Array, "B 1 L K/2"]]:
    """Computes float32 cosines and sines of each position's angles, which all heads share.

    Both are multiplied by the scale of queries and keys, see `frequencies`.
    """
    per_position, scale = frequencies(rope, head_dim)
    angles = positions[:, None, :, None].astype(jnp.float32) * per_position[None, None, None]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "B H L K"], rotation: tuple[Array, Array] | None
) -> Float[Array, "B H L K"]:
    """Rotates each pair of dimensions (i, i + K/2) in float32.

    The pairs are the same as in Hugging Face's models. If `rotation` is None, `x` is returned
    unchanged.
    """
    if rotation is None:
        return x
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
