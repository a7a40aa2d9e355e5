"""Sizes and variants of decoder-only models, as plain data."""

import dataclasses

from gkd_jax.models.t5_config import DTYPES, check_remat_policy

MLP_ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
LAYER_KINDS = ("full", "sliding", "full_nope", "sliding_nope")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding and its scaling to longer contexts.

    "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.

    Attributes:
      theta: base of the wavelengths.
      kind: 'default'; 'linear' ("Extending Context Window of Large Language Models via Positional
        Interpolation", arXiv 2306.15595: positions are divided by `factor`); 'llama3' (long
        wavelengths are multiplied by `factor`, short ones are unchanged); 'yarn' ("YaRN: Efficient
        Context Window Extension of Large Language Models", arXiv 2309.00071).
      factor: scaling factor.
      low_freq_factor: 'llama3' only: wavelengths above `original_length / low_freq_factor` are
        multiplied by `factor`.
      high_freq_factor: 'llama3' only: wavelengths below `original_length / high_freq_factor` are
        unchanged.
      original_length: context length before the scaling, in positions.
      beta_fast: 'yarn' only: dimensions that make more than this number of rotations within
        `original_length` positions are unchanged.
      beta_slow: 'yarn' only: for dimensions that make fewer than this number of rotations within
        `original_length` positions, wavelengths are multiplied by `factor`.
      attention_factor: 'yarn' only: scale of the rotated queries and keys; None for the paper's
        0.1 ln(factor) + 1.
      truncate: 'yarn' only: whether the dimensions between which the scaling is interpolated are
        rounded to integers. `beta_fast` gives the first of these dimensions, `beta_slow` the last.

    Raises:
      ValueError: an unknown kind, or a number that is not positive.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"Rope.kind must be one of {', '.join(ROPE_KINDS)}; got {self.kind!r}. Set "
                "Rope.kind to one of them."
            )
        for name in ("theta", "factor", "original_length", "high_freq_factor", "low_freq_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"Rope.{name} must be positive; got {getattr(self, name)}. Set Rope.{name} to "
                    "what the model's configuration says."
                )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and variants of a decoder-only model: Llama, Mistral, Qwen, Gemma, SmolLM3.

    Attributes:
      vocab_size: rows of the embedding, including padding.
      emb_dim: width of the hidden states, D.
      num_heads: number of query heads.
      num_kv_heads: number of heads of keys and values. Each of them is shared by
        num_heads / num_kv_heads query heads ("GQA: Training Generalized Multi-Query Transformer
        Models from Multi-Head Checkpoints", arXiv 2305.13245).
      head_dim: width of a head.
      mlp_dim: width of the gated feed-forward block.
      mlp_activation: activation of the gate in the feed-forward block.
      layer_kinds: the kind of each layer, with one entry per layer. In a 'full' layer, a position
        attends to itself and to all earlier positions. In a 'sliding' layer, it attends only to
        the last `sliding_window` of these positions. 'full_nope' and 'sliding_nope' are the same
        kinds without rotary embedding ("Rope to Nope and Back Again: A New Hybrid Attention
        Strategy", arXiv 2501.18795).
      sliding_window: number of positions that a position attends to in sliding layers, including
        itself.
      rope: rotary embedding of 'full' layers.
      sliding_rope: rotary embedding of 'sliding' layers; None to use `rope`.
      attention_bias: whether queries, keys and values have biases (Qwen2).
      attention_out_bias: whether the attention's output projection has a bias.
      mlp_bias: whether the feed-forward block has biases.
      qk_norm: whether RMSNorm is applied to each query and key head before rotation (Qwen3,
        Gemma 3).
      post_norms: whether RMSNorm is also applied to the outputs of both blocks before they are
        added to the residual stream (Gemma 2 and 3).
      norm_scale_offset: number that is added to the learned scales of the norms. Gemma adds 1 and
        initialises the scales to 0.
      norm_epsilon: epsilon of the norms.
      query_scale: factor that attention logits are multiplied by; None for 1 / sqrt(head_dim).
      attention_soft_cap: c of the soft cap c tanh(logits / c) of attention logits; None for no cap.
      final_soft_cap: c of the soft cap of the output logits; None for no cap.
      scale_embeddings: whether embeddings are multiplied by sqrt(emb_dim) (Gemma).
      tie_embeddings: whether the output layer shares the embedding's parameters.
      dropout_rate: dropout of the embeddings and of the output of each block.
      dtype: dtype of the computations and of the cache, 'float32' or 'bfloat16'. Softmax, norms and
        rotations are float32.
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
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    layer_kinds: tuple[str, ...]
    mlp_activation: str = "silu"
    sliding_window: int | None = None
    rope: Rope = Rope()
    sliding_rope: Rope | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_scale_offset: float = 0.0
    norm_epsilon: float = 1e-6
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    scale_embeddings: bool = False
    tie_embeddings: bool = False
    dropout_rate: float = 0.0
    dtype: str = "bfloat16"
    scan_layers: bool = False
    remat_policy: str = "none"

    def __post_init__(self) -> None:
        check_remat_policy("DecoderConfig", self.remat_policy)
        # A gin file may give a list, but models must be hashable.
        object.__setattr__(self, "layer_kinds", tuple(self.layer_kinds))
        for name in ("vocab_size", "emb_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}. "
                    f"Set DecoderConfig.{name} to the size of the model."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_heads must be a multiple of num_kv_heads; got "
                f"{self.num_heads} and {self.num_kv_heads}. Set DecoderConfig.num_kv_heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, since rotations turn pairs; got {self.head_dim}. Set "
                "DecoderConfig.head_dim."
            )
        self._check_names()
        for name in ("attention_soft_cap", "final_soft_cap", "query_scale", "norm_epsilon"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"{name} must be positive; got {value}. Set DecoderConfig.{name} to a positive "
                    "number" + ("." if name == "norm_epsilon" else ", or to None.")
                )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(
                f"dropout_rate must be at least 0 and below 1; got {self.dropout_rate}. Set "
                "DecoderConfig.dropout_rate, for example to 0.1, or to 0.0 for no dropout."
            )

    def _check_names(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("mlp_activation", MLP_ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}. "
                    f"Set DecoderConfig.{name} to one of them."
                )
        if not self.layer_kinds or not set(self.layer_kinds) <= set(LAYER_KINDS):
            raise ValueError(
                f"layer_kinds must name one of {', '.join(LAYER_KINDS)} for each layer; got "
                f"{self.layer_kinds}. Set DecoderConfig.layer_kinds, e.g. to ('full',) * 12."
            )
        window = self.sliding_window
        if self.has_window and (window is None or window < 1):
            raise ValueError(
                f"sliding layers need a window of at least 1; got {window}. Set "
                "DecoderConfig.sliding_window to how many positions they see."
            )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_kinds)

    @property
    def has_window(self) -> bool:
        """Whether there is a layer with a sliding window."""
        return any(is_sliding(kind) for kind in self.layer_kinds)


def is_sliding(kind: str) -> bool:
    """Returns whether layers of this kind attend only within a sliding window."""
    return kind in ("sliding", "sliding_nope")


def is_rotated(kind: str) -> bool:
    """Returns whether layers of this kind rotate queries and keys."""
    return kind in ("full", "sliding")
