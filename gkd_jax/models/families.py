"""Hugging Face's architectures in our words: config.json to a model and back.

A field that changes what a model computes is either understood or refused by name, so that no
model is ever another one than its config.json says.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gkd_jax.models.base import LanguageModel
from gkd_jax.models.decoder_config import DecoderConfig, Rope, is_rotated, is_sliding
from gkd_jax.models.decoder_only import DecoderOnly
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config

HFConfig = Mapping[str, Any]

_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text")
_WITH_A_TEXT_PART = ("gemma3",)
SUPPORTED = ("t5", *_DECODERS, *_WITH_A_TEXT_PART)

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
_T5_PROJECTIONS = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
}
_KINDS = {"full_attention": "full", "sliding_attention": "sliding"}


def model_from_hf(
    config: HFConfig, *, dtype: str = "bfloat16", dropout_rate: float = 0.0, **how: Any
) -> LanguageModel:
    """The model that a config.json describes.

    Args:
      config: its contents.
      dtype: compute dtype, 'float32' or 'bfloat16'.
      dropout_rate: in training; config.json's own is not taken.
      how: `scan_layers` and `remat_policy` of the configuration.

    Raises:
      ValueError: an architecture, or a value of a field, that is not supported; names it.
    """
    config = text_part(config)
    kind = config.get("model_type")
    if kind == "t5":
        return T5(dataclasses.replace(_t5_from_hf(config, dtype, dropout_rate), **how))
    if kind in _DECODERS:
        return DecoderOnly(
            dataclasses.replace(_decoder_from_hf(config, dtype, dropout_rate), **how)
        )
    raise ValueError(
        f"model_type {kind!r} of config.json is not supported; supported are "
        f"{', '.join(SUPPORTED)}. Choose a checkpoint of one of these architectures."
    )


def text_part(config: HFConfig) -> HFConfig:
    """The language model's part of the configuration of one that sees images too."""
    if config.get("model_type") not in _WITH_A_TEXT_PART:
        return config
    return {"model_type": "gemma3_text"} | dict(config["text_config"])


def model_to_hf(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model, which both `transformers` 4 and 5 read.

    Raises:
      ValueError: no architecture has this combination of settings.
    """
    if isinstance(model, T5):
        described = _t5_to_hf(model.config)
    elif isinstance(model, DecoderOnly):
        described = _decoder_to_hf(model.config)
    else:
        raise ValueError(f"{type(model).__name__} has no counterpart in Hugging Face's format.")
    given = model.config
    back = model_from_hf(
        described, dtype=given.dtype, dropout_rate=given.dropout_rate,
        scan_layers=given.scan_layers, remat_policy=given.remat_policy,
    ).config  # fmt: skip
    if back != given:
        names = [field.name for field in dataclasses.fields(given)]
        differing = [name for name in names if getattr(back, name) != getattr(given, name)]
        raise ValueError(
            f"no architecture of Hugging Face's computes this {type(given).__name__}: as "
            f"{described['model_type']}, the nearest, it would have "
            + ", ".join(f"{name} = {getattr(back, name)}" for name in differing)
            + f" in the place of {', '.join(str(getattr(given, name)) for name in differing)}. "
            "Export it as gkd_jax's own parameters, or train a model of a known architecture."
        )
    return described


def _choose(config: HFConfig, field: str, choices: Mapping[str, Any], default: Any = None) -> Any:
    value = config.get(field) or default
    if value not in choices:
        raise ValueError(
            f"{field} = {value!r} of config.json is not supported; supported are "
            f"{', '.join(map(repr, choices))}. Choose another checkpoint."
        )
    return choices[value]


def _require(config: HFConfig, **wanted: Any) -> None:
    """Refuses a field that is there and has another value than all supported models have."""
    for field, value in wanted.items():
        if config.get(field) not in (None, value):
            raise ValueError(
                f"{field} = {config[field]!r} of config.json is not supported; only {value!r} is. "
                "Choose another checkpoint."
            )


def _t5_from_hf(config: HFConfig, dtype: str, dropout_rate: float) -> T5Config:
    _require(
        config,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
    )
    return T5Config(
        vocab_size=config["vocab_size"],
        emb_dim=config["d_model"],
        num_heads=config["num_heads"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        mlp_activations=_choose(config, "feed_forward_proj", _T5_PROJECTIONS, "relu"),
        dropout_rate=dropout_rate,
        # transformers 5 calls every T5 tied, and has T5 1.1's own head beside that.
        logits_via_embedding=bool(
            config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        ),
        dtype=dtype,
        decoder_start_id=config.get("decoder_start_token_id") or 0,
    )


def _t5_to_hf(config: T5Config) -> dict[str, Any]:
    names = {activations: name for name, activations in _T5_PROJECTIONS.items()}
    projection = names.get(config.mlp_activations, "relu")
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "feed_forward_proj": projection,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": config.dropout_rate,
        "tie_word_embeddings": config.logits_via_embedding,
        "decoder_start_token_id": config.decoder_start_id,
    }


def _decoder_from_hf(config: HFConfig, dtype: str, dropout_rate: float) -> DecoderConfig:
    kind = config["model_type"]
    is_gemma = kind.startswith("gemma")
    _require(config, partial_rotary_factor=1.0, use_bidirectional_attention=False)
    num_heads, emb_dim = config["num_attention_heads"], config["hidden_size"]
    has_bias = bool(config.get("attention_bias", False))
    layer_kinds = _layer_kinds(config)
    full, sliding = _ropes(config)
    head_dim = config.get("head_dim") or emb_dim // num_heads
    query_scale = config.get("query_pre_attn_scalar")
    if kind not in ("gemma2", "gemma3_text") or query_scale == head_dim:
        query_scale = None
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        mlp_dim=config["intermediate_size"],
        layer_kinds=layer_kinds,
        mlp_activation=_choose(
            config,
            "hidden_activation" if is_gemma and config.get("hidden_activation") else "hidden_act",
            _ACTIVATIONS,
            "gelu_pytorch_tanh" if is_gemma else "silu",
        ),
        sliding_window=config["sliding_window"] if any(map(is_sliding, layer_kinds)) else None,
        rope=full,
        sliding_rope=sliding if "sliding" in layer_kinds and sliding != full else None,
        attention_bias=True if kind == "qwen2" else has_bias,
        attention_out_bias=False if kind == "qwen2" else has_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind in ("qwen3", "gemma3_text"),
        post_norms=kind in ("gemma2", "gemma3_text"),
        norm_scale_offset=1.0 if is_gemma else 0.0,
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        query_scale=None if query_scale is None else query_scale**-0.5,
        attention_soft_cap=config.get("attn_logit_softcapping"),
        final_soft_cap=config.get("final_logit_softcapping"),
        scale_embeddings=is_gemma,
        tie_embeddings=bool(config.get("tie_word_embeddings", is_gemma or kind == "smollm3")),
        dropout_rate=dropout_rate,
        dtype=dtype,
    )


def _layer_kinds(config: HFConfig) -> tuple[str, ...]:
    """As listed, or by the rule that the architecture had before it listed them."""
    kind, count = config["model_type"], config["num_hidden_layers"]
    if kind == "smollm3":
        return _smollm3_layer_kinds(config, count)
    if config.get("layer_types"):
        return tuple(_choose({"layer_types": one}, "layer_types", _KINDS)
                     for one in config["layer_types"])  # fmt: skip
    if kind == "gemma2":
        return tuple("full" if layer % 2 else "sliding" for layer in range(count))
    if kind == "gemma3_text":
        period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        return tuple("sliding" if (layer + 1) % period else "full" for layer in range(count))
    if kind == "mistral" and config.get("sliding_window"):
        return ("sliding",) * count
    if kind in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        first = config.get("max_window_layers", 28)
        return tuple("sliding" if layer >= first else "full" for layer in range(count))
    return ("full",) * count


def _smollm3_layer_kinds(config: HFConfig, count: int) -> tuple[str, ...]:
    interval = config.get("no_rope_layer_interval") or 4
    rotated = config.get("no_rope_layers")
    if rotated is None:
        rotated = [int((layer + 1) % interval != 0) for layer in range(count)]
    has_window = config.get("use_sliding_window") and config.get("sliding_window")
    types = config.get("layer_types") or [
        "sliding_attention" if has_window and not one else "full_attention" for one in rotated
    ]
    return tuple(
        _choose({"layer_types": one}, "layer_types", _KINDS) + ("" if rotates else "_nope")
        for one, rotates in zip(types[:count], rotated[:count], strict=True)
    )


def _ropes(config: HFConfig) -> tuple[Rope, Rope]:
    """Those of full and of sliding layers: `rope_parameters`, or the fields that came before it."""
    given = config.get("rope_parameters")
    is_gemma3 = config["model_type"] == "gemma3_text"
    if given and set(given) <= set(_KINDS):
        return _rope(config, given["full_attention"]), _rope(config, given["sliding_attention"])
    if given:
        both = _rope(config, given)
        return both, both
    default = {"gemma3_text": 1_000_000.0, "smollm3": 2_000_000.0}
    theta = config.get("rope_theta", default.get(config["model_type"], 10_000.0))
    full = _rope(config, {"rope_theta": theta} | dict(config.get("rope_scaling") or {}))
    if is_gemma3:
        return full, Rope(config.get("rope_local_base_freq", 10_000.0))
    return full, full


def _rope(config: HFConfig, given: Mapping[str, Any]) -> Rope:
    kind = given.get("rope_type") or given.get("type") or "default"
    theta = float(given.get("rope_theta", config.get("rope_theta", 10_000.0)))
    known = {"rope_type", "type", "rope_theta"}
    fields: dict[str, Any] = {}
    if kind != "default":
        fields["factor"] = float(given["factor"])
        known.add("factor")
    if kind == "llama3":
        names = {
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_length",
        }
    elif kind == "yarn":
        names = {
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
            "truncate": "truncate",
            "original_max_position_embeddings": "original_length",
        }
        fields["original_length"] = config.get("max_position_embeddings", 8192)
    elif kind in ("default", "linear"):
        names = {}
    else:
        raise ValueError(
            f"rope_type {kind!r} of config.json is not supported; supported are 'default', "
            "'linear', 'llama3' and 'yarn'. Choose another checkpoint, or leave the stretching out "
            "of its config.json where contexts stay short."
        )
    present = {name: value for name, value in given.items() if value is not None}
    fields |= {ours: present[theirs] for theirs, ours in names.items() if theirs in present}
    unknown = set(present) - known - set(names)
    if kind != "default" and unknown:
        raise ValueError(
            f"rope_parameters.{sorted(unknown)[0]} of config.json is not supported for rope_type "
            f"{kind!r}. Choose another checkpoint."
        )
    return Rope(theta=theta, kind=kind, **fields)


def _architecture(config: DecoderConfig) -> str:
    if config.norm_scale_offset:
        if config.qk_norm:
            return "gemma3_text"
        return "gemma2" if config.post_norms else "gemma"
    if any(not is_rotated(kind) for kind in config.layer_kinds):
        return "smollm3"
    if config.qk_norm:
        return "qwen3"
    if config.attention_bias and not config.attention_out_bias:
        return "qwen2"
    return "mistral" if "sliding" in config.layer_kinds else "llama"


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _decoder_to_hf(config: DecoderConfig) -> dict[str, Any]:
    kind = _architecture(config)
    activations = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}
    layer_types = {"full": "full_attention", "sliding": "sliding_attention"}
    described: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": activations[config.mlp_activation],
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config.rope),
    }
    if kind not in ("qwen2", "mistral"):
        described["attention_bias"] = config.attention_bias
    if kind in ("llama", "smollm3"):
        described["mlp_bias"] = config.mlp_bias
    if kind.startswith("gemma"):
        described["hidden_activation"] = described["hidden_act"]
    if kind in ("gemma2", "gemma3_text"):
        scale = config.query_scale
        # A whole number where it was one: 1 / sqrt(x) and back is a rounding away.
        scalar = config.head_dim if scale is None else round(scale**-2, 6)
        described["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
        described["attn_logit_softcapping"] = config.attention_soft_cap
        described["final_logit_softcapping"] = config.final_soft_cap
    if kind == "gemma3_text":
        described["rope_local_base_freq"] = (config.sliding_rope or config.rope).theta
    if kind != "llama" and kind != "gemma":
        described["layer_types"] = [
            layer_types[one.removesuffix("_nope")] for one in config.layer_kinds
        ]
    if kind == "smollm3":
        # Without them, transformers takes SmolLM3's own, which a smaller vocabulary does not have.
        described |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        described["no_rope_layers"] = [int(is_rotated(one)) for one in config.layer_kinds]
    if config.has_window:
        described["sliding_window"] = config.sliding_window
        described["use_sliding_window"] = True
    elif kind == "mistral":
        described["sliding_window"] = None
    return described


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    described: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        described |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    if rope.kind == "yarn":
        described |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "original_max_position_embeddings": rope.original_length,
            "truncate": rope.truncate,
        }
        if rope.attention_factor is not None:
            described["attention_factor"] = rope.attention_factor
    return described
