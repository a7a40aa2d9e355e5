"""Sizes and variants of T5, as plain data."""

import dataclasses

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full")
ACTIVATIONS = ("gelu", "relu", "silu", "swish", "linear")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and variants of a T5 model, with the field names of T5X's minimal T5.

    T5 1.1 has `mlp_activations=('gelu', 'linear')` and a separate output layer. T5 1.0 has
    `mlp_activations=('relu',)` and `logits_via_embedding=True`; its logits are scaled by
    1/sqrt(emb_dim).

    Attributes:
      vocab_size: rows of the embedding, including padding (32,128 in the released models).
      dtype: dtype of the computations, 'float32' or 'bfloat16'. Parameters, softmax and norms are
        float32.
      decoder_start_id: id of the token that starts every output; 0 (padding) in every T5.
      scan_layers: whether layers run in a loop over stacked parameters, so that the size of the
        compiled program does not grow with the depth.
      remat_policy: which activations are recomputed in the backward pass. 'none': no activations.
        'minimal': all except the outputs of matrix products with weights. 'full': all except the
        hidden states between layers.

    Raises:
      ValueError: a size is below 1, or the value of a setting is not supported.
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
    scan_layers: bool = False
    remat_policy: str = "none"

    def __post_init__(self) -> None:
        # A gin file may give a list, but models must be hashable.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        sizes = (
            "vocab_size",
            "emb_dim",
            "num_heads",
            "num_encoder_layers",
            "num_decoder_layers",
            "head_dim",
            "mlp_dim",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}. "
                    f"Set T5Config.{name} to the size of the model."
                )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}. "
                "Set T5Config.dtype to one of them."
            )
        check_remat_policy("T5Config", self.remat_policy)
        unknown = [name for name in self.mlp_activations if name not in ACTIVATIONS]
        if unknown or not self.mlp_activations:
            raise ValueError(
                f"mlp_activations must be one or more of {', '.join(ACTIVATIONS)}; got "
                f"{self.mlp_activations}. Set T5Config.mlp_activations to ('gelu', 'linear') "
                "for T5 1.1 or ('relu',) for T5 1.0."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(
                f"dropout_rate must be at least 0 and below 1; got {self.dropout_rate}. "
                "Set T5Config.dropout_rate, for example to 0.1, or to 0.0 for no dropout."
            )
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise ValueError(
                f"decoder_start_id must be an id below vocab_size ({self.vocab_size}); got "
                f"{self.decoder_start_id}. Set T5Config.decoder_start_id to 0, as every T5 has it."
            )


def check_remat_policy(config: str, policy: str) -> None:
    """Checks the rematerialisation policy of a configuration.

    Args:
      config: name of the configuration's class, for the error message.
      policy: the configuration's `remat_policy`.

    Raises:
      ValueError: the policy is unknown.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(
            f"remat_policy must be one of {', '.join(REMAT_POLICIES)}; got {policy!r}. Set "
            f"{config}.remat_policy (REMAT_POLICY) to one of them."
        )
