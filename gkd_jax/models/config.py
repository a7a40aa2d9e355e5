"""Sizes of models: plain data that every floor may name."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and variants of a T5 encoder-decoder, in the names of T5X's minimal T5.

    T5 1.1 has `mlp_activations=('gelu', 'linear')` and a head of its own; T5 1.0 has
    `mlp_activations=('relu',)` and `logits_via_embedding=True`, whose logits are scaled by
    1/sqrt(emb_dim).

    Attributes:
      vocab_size: rows of the embedding, padding included (32,128 for the released models).
      dtype: compute dtype, 'float32' or 'bfloat16'. Parameters, softmax and norms are float32.
      decoder_start_id: the token that starts every output; 0 (padding) in every T5.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "bfloat16"
    decoder_start_id: int = 0
