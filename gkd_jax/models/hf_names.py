"""Names of parameters in Hugging Face checkpoints."""

import dataclasses
import re

from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.t5_config import T5Config


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """A tensor in a Hugging Face checkpoint.

    Attributes:
      names: the name used for writing, followed by alternative names that are accepted for reading.
      is_transposed: whether the tensor is [out, in] while the parameter in gkd_jax is [in, out].
    """

    names: tuple[str, ...]
    is_transposed: bool


_DECODER_PARTS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
    "pre_attention_norm": "input_layernorm",
}
# 'post_attention_layernorm' is the norm after the attention in models with norms after both blocks,
# and the norm before the feed-forward block in others.
_WITH_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_WITHOUT = {"pre_mlp_norm": "post_attention_layernorm"}

_T5_PARTS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_T5_ENCODER = {
    "pre_attention_layer_norm": "layer.0.layer_norm",
    "pre_mlp_layer_norm": "layer.1.layer_norm",
    "attention": "layer.0.SelfAttention",
    "mlp": "layer.1.DenseReluDense",
}
_T5_DECODER = {
    "pre_self_attention_layer_norm": "layer.0.layer_norm",
    "pre_cross_attention_layer_norm": "layer.1.layer_norm",
    "pre_mlp_layer_norm": "layer.2.layer_norm",
    "self_attention": "layer.0.SelfAttention",
    "encoder_decoder_attention": "layer.1.EncDecAttention",
    "mlp": "layer.2.DenseReluDense",
}


def hf_tensor(name: str, config: T5Config | DecoderConfig) -> HFTensor:
    """Describes the checkpoint's tensor for a parameter such as 'layers_0/mlp/wo/kernel'."""
    if isinstance(config, T5Config):
        return _t5_tensor(name)
    return _decoder_tensor(name, config)


def is_left_out(name: str, config: T5Config | DecoderConfig) -> bool:
    """Returns whether a tensor of a checkpoint is ignored.

    Ignored tensors are copies of other tensors, can be computed from the configuration, or belong
    to the vision part of a model.
    """
    if isinstance(config, T5Config):
        is_tied = config.logits_via_embedding
        copies = r"(encoder|decoder)\.embed_tokens\.weight"
    else:
        is_tied = config.tie_embeddings
        copies = r".*rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*"
    return bool(re.fullmatch(copies, name)) or (is_tied and name.endswith("lm_head.weight"))


def _decoder_tensor(name: str, config: DecoderConfig) -> HFTensor:
    kind = name.rpartition("/")[2]
    suffix = "bias" if kind == "bias" else "weight"
    if name == "logits_dense/kernel":
        return HFTensor(("lm_head.weight", "language_model.lm_head.weight"), True)
    layer = re.fullmatch(r"layers_(\d+)/(.+)/(kernel|bias|scale)", name)
    if layer:
        parts = _DECODER_PARTS | (_WITH_POST_NORMS if config.post_norms else _WITHOUT)
        inner = f"layers.{layer[1]}.{parts[layer[2]]}.{suffix}"
    else:
        inner = {
            "token_embedder/embedding": "embed_tokens.weight",
            "decoder_norm/scale": "norm.weight",
        }[name]
    # The last two prefixes occur in checkpoints of models that also take images.
    prefixes = ("model.", "language_model.model.", "model.language_model.")
    return HFTensor(tuple(prefix + inner for prefix in prefixes), kind == "kernel")


def _t5_tensor(name: str) -> HFTensor:
    fixed = {
        "token_embedder/embedding": HFTensor(
            ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), False
        ),
        "decoder/logits_dense/kernel": HFTensor(("lm_head.weight",), True),
    }
    if name in fixed:
        return fixed[name]
    side, rest = name.split("/", 1)
    if rest == "relpos_bias/rel_embedding":
        inner = "block.0.layer.0.SelfAttention.relative_attention_bias"
        return HFTensor((f"{side}.{inner}.weight",), True)
    if rest == f"{side}_norm/scale":
        return HFTensor((f"{side}.final_layer_norm.weight",), False)
    layer = re.fullmatch(r"layers_(\d+)/(\w+)(?:/(\w+))?/(kernel|scale)", rest)
    assert layer is not None, name
    block = (_T5_ENCODER if side == "encoder" else _T5_DECODER)[layer[2]]
    inner = "" if layer[3] is None else f".{_T5_PARTS.get(layer[3], layer[3])}"
    full = f"{side}.block.{layer[1]}.{block}{inner}.weight"
    return HFTensor((full,), layer[4] == "kernel")
