"""Configurations of released models by name: T5, Llama 3, Qwen 3."""

from typing import Any

from gkd_jax.models.decoder_config import DecoderConfig, Rope
from gkd_jax.models.t5_config import T5Config

T5_VOCAB_SIZE = 32_128
"""T5's 32,000 pieces and 100 sentinels, padded to a multiple of 128."""

# Name: (emb_dim, num_heads, layers, head_dim, mlp_dim). The encoder and the decoder each have this
# number of layers.
# Source: the gin files of T5X, t5x/examples/t5/t5_1_0 and t5_1_1.
_SIZES = {
    "t5_1_0-small": (512, 8, 6, 64, 2048),
    "t5_1_0-base": (768, 12, 12, 64, 3072),
    "t5_1_0-large": (1024, 16, 24, 64, 4096),
    "t5_1_0-3b": (1024, 32, 24, 128, 16384),
    "t5_1_0-11b": (1024, 128, 24, 128, 65536),
    "t5_1_1-small": (512, 6, 8, 64, 1024),
    "t5_1_1-base": (768, 12, 12, 64, 2048),
    "t5_1_1-large": (1024, 16, 24, 64, 2816),
    "t5_1_1-xl": (2048, 32, 24, 64, 5120),
    "t5_1_1-xxl": (4096, 64, 24, 64, 10240),
}

T5_NAMES: tuple[str, ...] = tuple(_SIZES)


def t5_config(
    name: str,
    *,
    vocab_size: int = T5_VOCAB_SIZE,
    dropout_rate: float = 0.0,
    dtype: str = "bfloat16",
    scan_layers: bool = False,
    remat_policy: str = "none",
) -> T5Config:
    """Returns the configuration of a released T5.

    FLAN-T5 has the same sizes as T5 1.1.

    Args:
      name: `t5_1_1-small` to `-xxl` (gated GELU, separate output layer), `t5_1_0-small` to `-11b`
        (ReLU, tied output layer).
      vocab_size: rows of the embedding.
      dropout_rate: see `T5Config`.
      dtype: dtype of the computations, 'float32' or 'bfloat16'.
      scan_layers: see `T5Config`.
      remat_policy: see `T5Config`.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in _SIZES:
        raise ValueError(
            f"name must be a known T5 size; got {name!r}. Use one of {', '.join(T5_NAMES)}, or "
            "build a T5Config from its own sizes."
        )
    emb_dim, num_heads, num_layers, head_dim, mlp_dim = _SIZES[name]
    first_version = name.startswith("t5_1_0-")
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        mlp_activations=("relu",) if first_version else ("gelu", "linear"),
        dropout_rate=dropout_rate,
        logits_via_embedding=first_version,
        dtype=dtype,
        scan_layers=scan_layers,
        remat_policy=remat_policy,
    )


# Name: (emb_dim, layers, num_heads, num_kv_heads, mlp_dim, whether the output layer is tied to the
# embedding).
# Source: config.json of meta-llama/Meta-Llama-3-* and Qwen/Qwen3-*. Base and chat models have the
# same sizes.
_DECODER_SIZES = {
    "llama3-8b": (4096, 32, 32, 8, 14336, False),
    "llama3-70b": (8192, 80, 64, 8, 28672, False),
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, True),
    "qwen3-1.7b": (2048, 28, 16, 8, 6144, True),
    "qwen3-4b": (2560, 36, 32, 8, 9728, True),
    "qwen3-8b": (4096, 36, 32, 8, 12288, False),
    "qwen3-14b": (5120, 40, 40, 8, 17408, False),
    "qwen3-32b": (5120, 64, 64, 8, 25600, False),
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": dict(vocab_size=128_256, rope=Rope(500_000.0), norm_epsilon=1e-5),
    "qwen3": dict(vocab_size=151_936, rope=Rope(1_000_000.0), norm_epsilon=1e-6, qk_norm=True),
}

DECODER_NAMES: tuple[str, ...] = tuple(_DECODER_SIZES)


def decoder_config(
    name: str,
    *,
    dropout_rate: float = 0.0,
    dtype: str = "bfloat16",
    scan_layers: bool = False,
    remat_policy: str = "none",
) -> DecoderConfig:
    """Returns the configuration of a released decoder-only model.

    No checkpoint is needed. `checkpoints.hf.hf_model` returns the same configuration if it reads
    the `config.json` of the model's checkpoint.

    Args:
      name: `llama3-8b`, `llama3-70b`, `qwen3-0.6b` to `qwen3-32b`.
      dropout_rate: see `DecoderConfig`.
      dtype: dtype of the computations, 'float32' or 'bfloat16'.
      scan_layers: see `DecoderConfig`.
      remat_policy: see `DecoderConfig`.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in _DECODER_SIZES:
        raise ValueError(
            f"name must be a known decoder-only model; got {name!r}. Use one of "
            f"{', '.join(DECODER_NAMES)}, or take the model of a checkpoint's config.json "
            "(gin_configs/hf.gin)."
        )
    emb_dim, num_layers, num_heads, num_kv_heads, mlp_dim, is_tied = _DECODER_SIZES[name]
    return DecoderConfig(
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        mlp_dim=mlp_dim,
        layer_kinds=("full",) * num_layers,
        tie_embeddings=is_tied,
        dropout_rate=dropout_rate,
        dtype=dtype,
        scan_layers=scan_layers,
        remat_policy=remat_policy,
        **_FAMILIES[name.partition("-")[0]],
    )
