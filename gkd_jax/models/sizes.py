"""Sizes of the released T5 models, by name."""

from gkd_jax.models.config import T5Config

T5_VOCAB_SIZE = 32_128
"""T5's 32,000 pieces and 100 sentinels, padded to a multiple of 128."""

# Name: (emb_dim, num_heads, layers of the encoder and of the decoder, head_dim, mlp_dim).
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
    """Makes the configuration of a released T5.

    FLAN-T5 has the sizes of T5 1.1.

    Args:
      name: `t5_1_1-small` to `-xxl` (gated GELU, separate head), `t5_1_0-small` to `-11b`
        (ReLU, tied head).
      vocab_size: rows of the embedding.
      dropout_rate: as `T5Config.dropout_rate`.
      dtype: compute dtype, 'float32' or 'bfloat16'.
      scan_layers: as `T5Config.scan_layers`.
      remat_policy: as `T5Config.remat_policy`.

    Returns:
      The configuration.

    Raises:
      ValueError: an unknown name.
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
