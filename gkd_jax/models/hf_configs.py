"""Translation between the fields of Hugging Face's `config.json` and gkd_jax's configurations.

This module has the code that all families share. The `Family` records in `families` state how the
families differ.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from gkd_jax.models.decoder_config import DecoderConfig, Rope, is_rotated, is_sliding
from gkd_jax.models.t5_config import T5Config

HFConfig: TypeAlias = Mapping[str, Any]
"""The contents of a `config.json`."""

# If an activation has several names, the first is written to config.json.
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
_LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}
_DEFAULTS: HFConfig = dict(hidden_act="silu", rope_theta=10_000.0, tie_word_embeddings=False)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Properties of a decoder-only architecture of Hugging Face.

    Attributes:
      model_type: name of the architecture in `config.json`.
      class_name: name of its class in `transformers`, including the output layer.
      layer_kinds: computes the kinds of layers if `config.json` does not list `layer_types`.
      computes: returns whether a configuration has the characteristics of this family. A model is
        exported as the last family in `families._DECODERS` whose `computes` returns True.
      rotated: computes for each layer whether it has rotary embeddings. Used only if `config.json`
        lists `layer_types`; None if all layers have rotary embeddings.
      settings: fields of `DecoderConfig` that have the same value in all models of the family.
      defaults: defaults of fields that `config.json` may omit, if they differ from `_DEFAULTS`.
      fields: names of the optional fields in the family's `config.json`, see `_OPTIONAL_FIELDS`.
      with_images: model types that also take images and whose `text_config` describes a model of
        this family.
    """

    model_type: str
    class_name: str
    layer_kinds: Callable[[HFConfig], tuple[str, ...]]
    computes: Callable[[DecoderConfig], bool]
    rotated: Callable[[HFConfig], Sequence[bool]] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: HFConfig = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    with_images: tuple[str, ...] = ()


def decoder_from_hf(family: Family, config: HFConfig) -> DecoderConfig:
    """Returns the configuration of a decoder-only model, in the default dtype.

    Raises:
      ValueError: the value of a field is not supported; the message names it.
    """
    _require(config, partial_rotary_factor=1.0, use_bidirectional_attention=False)
    config = {**_DEFAULTS, **family.defaults, **config}
    num_heads, emb_dim = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or emb_dim // num_heads
    has_bias = bool(config.get("attention_bias", False))
    layer_kinds = _layer_kinds(family, config)
    rope, sliding_rope = _ropes(config)
    settings: dict[str, Any] = dict(
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        query_scale=_query_scale(family, config, head_dim),
        attention_soft_cap=config.get("attn_logit_softcapping"),
        final_soft_cap=config.get("final_logit_softcapping"),
    )
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        mlp_dim=config["intermediate_size"],
        layer_kinds=layer_kinds,
        mlp_activation=_activation(family, config),
        sliding_window=config["sliding_window"] if any(map(is_sliding, layer_kinds)) else None,
        rope=rope,
        sliding_rope=sliding_rope if "sliding" in layer_kinds and sliding_rope != rope else None,
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(config["tie_word_embeddings"]),
        **{**settings, **family.settings},
    )


def decoder_to_hf(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """Returns the contents of a `config.json` that describes `config` as a model of `family`."""
    described: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": _activation_name(config),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config.rope),
    }
    described |= {name: _OPTIONAL_FIELDS[name](config) for name in family.fields}
    if config.has_window:
        described["sliding_window"] = config.sliding_window
        described["use_sliding_window"] = True
    return described


def _activation_name(config: DecoderConfig) -> str:
    return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.mlp_activation)


def _query_scalar(config: DecoderConfig) -> float:
    scale = config.query_scale
    # Rounded, because (1 / sqrt(x))**-2 differs from x by a rounding error.
    scalar = config.head_dim if scale is None else round(scale**-2, 6)
    return int(scalar) if scalar == int(scalar) else scalar


def _layer_types(config: DecoderConfig) -> list[str]:
    return [
        "sliding_attention" if is_sliding(kind) else "full_attention" for kind in config.layer_kinds
    ]


# The fields that only some families write to config.json, and how their values are computed.
_OPTIONAL_FIELDS: dict[str, Callable[[DecoderConfig], Any]] = {
    "attention_bias": lambda config: config.attention_bias,
    "mlp_bias": lambda config: config.mlp_bias,
    "hidden_activation": _activation_name,
    "query_pre_attn_scalar": _query_scalar,
    "attn_logit_softcapping": lambda config: config.attention_soft_cap,
    "final_logit_softcapping": lambda config: config.final_soft_cap,
    "rope_local_base_freq": lambda config: (config.sliding_rope or config.rope).theta,
    "layer_types": _layer_types,
    "no_rope_layers": lambda config: [int(is_rotated(kind)) for kind in config.layer_kinds],
    "sliding_window": lambda config: config.sliding_window,
    "pad_token_id": lambda config: None,
    "bos_token_id": lambda config: None,
    "eos_token_id": lambda config: None,
}


def _layer_kinds(family: Family, config: HFConfig) -> tuple[str, ...]:
    """Returns the kind of each layer.

    The kinds are read from `layer_types`. Older checkpoints do not have this field. For these, the
    kinds are computed by `Family.layer_kinds`.
    """
    if not config.get("layer_types"):
        return family.layer_kinds(config)
    kinds = [
        _choose({"layer_types": one}, "layer_types", _LAYER_TYPES) for one in config["layer_types"]
    ]
    if family.rotated is None:
        return tuple(kinds)
    rotated = family.rotated(config)
    return tuple(
        kind if is_rotated else f"{kind}_nope"
        for kind, is_rotated in zip(kinds, rotated, strict=True)
    )


def _activation(family: Family, config: HFConfig) -> str:
    has_own = "hidden_activation" in family.fields and config.get("hidden_activation")
    default = family.defaults.get("hidden_act", _DEFAULTS["hidden_act"])
    name: str = _choose(
        config, "hidden_activation" if has_own else "hidden_act", _ACTIVATIONS, default
    )
    return name


def _query_scale(family: Family, config: HFConfig, head_dim: int) -> float | None:
    scalar = config.get("query_pre_attn_scalar")
    if scalar is None or scalar == head_dim or "query_pre_attn_scalar" not in family.fields:
        return None
    return float(scalar**-0.5)


def _ropes(config: HFConfig) -> tuple[Rope, Rope]:
    """Returns the rotary embeddings of full and of sliding layers.

    Reads `rope_parameters` if the field is present, and otherwise the older fields `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`.
    """
    given = config.get("rope_parameters")
    theta = config["rope_theta"]
    local_theta = config.get("rope_local_base_freq", theta)
    if given and set(given) <= set(_LAYER_TYPES):
        return (
            _rope(config, given["full_attention"], theta),
            _rope(config, given["sliding_attention"], local_theta),
        )
    if given:
        both = _rope(config, given, theta)
        return both, both
    full = _rope(config, config.get("rope_scaling") or {}, theta)
    return full, full if "rope_local_base_freq" not in config else Rope(local_theta)


def _rope(config: HFConfig, given: Mapping[str, Any], default_theta: float) -> Rope:
    kind = given.get("rope_type") or given.get("type") or "default"
    theta = float(given.get("rope_theta", default_theta))
    known = {"rope_type", "type", "rope_theta"}
    fields: dict[str, Any] = {}
    if kind != "default":
        fields["factor"] = float(given["factor"])
        known.add("factor")
    if kind not in _ROPE_FIELDS:
        raise ValueError(
            f"rope_type {kind!r} of config.json is not supported; supported are 'default', "
            "'linear', 'llama3' and 'yarn'. Choose another checkpoint, or leave the stretching out "
            "of its config.json where contexts stay short."
        )
    names = _ROPE_FIELDS[kind]
    if kind == "yarn":
        fields["original_length"] = config.get("max_position_embeddings", 8192)
    present = {name: value for name, value in given.items() if value is not None}
    fields |= {ours: present[theirs] for theirs, ours in names.items() if theirs in present}
    unknown = set(present) - known - set(names)
    if kind != "default" and unknown:
        raise ValueError(
            f"rope_parameters.{sorted(unknown)[0]} of config.json is not supported for rope_type "
            f"{kind!r}. Choose another checkpoint."
        )
    return Rope(theta=theta, kind=kind, **fields)


# Maps each kind of scaling to its fields in config.json, without the factor, and each of these
# fields to its name in `Rope`.
_ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {},
    "llama3": {
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "original_max_position_embeddings": "original_length",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
}


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    described: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    values = {theirs: getattr(rope, ours) for theirs, ours in _ROPE_FIELDS[rope.kind].items()}
    return described | {theirs: value for theirs, value in values.items() if value is not None}


def t5_from_hf(config: HFConfig) -> T5Config:
    """Returns the configuration of a T5, in the default dtype.

    Raises:
      ValueError: the value of a field is not supported; the message names it.
    """
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
        # transformers 5 writes tie_word_embeddings = True for every T5, so that field cannot be
        # relied on. It also writes scale_decoder_outputs, which is False if the output layer is
        # separate (T5 1.1), so that field is read first.
        logits_via_embedding=bool(
            config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        ),
        decoder_start_id=config.get("decoder_start_token_id") or 0,
    )


def t5_to_hf(config: T5Config) -> dict[str, Any]:
    """Returns the `config.json` of a T5."""
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


def _choose(config: HFConfig, field: str, choices: Mapping[str, Any], default: Any = None) -> Any:
    value = config.get(field) or default
    if value not in choices:
        raise ValueError(
            f"{field} = {value!r} of config.json is not supported; supported are "
            f"{', '.join(map(repr, choices))}. Choose another checkpoint."
        )
    return choices[value]


def _require(config: HFConfig, **wanted: Any) -> None:
    """Checks that each field is missing or has its only supported value."""
    for field, value in wanted.items():
        if config.get(field) not in (None, value):
            raise ValueError(
                f"{field} = {config[field]!r} of config.json is not supported; only {value!r} is. "
                "Choose another checkpoint."
            )
