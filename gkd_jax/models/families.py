"""Hugging Face model families: conversion between `config.json` and models.

Each decoder-only family is one record of `_DECODERS`. A new family needs only another record if
`decoder_only` already implements its computations. A field that changes what a model computes is
either translated or raises an error that names the field. A model therefore never differs from its
`config.json`.
"""

import dataclasses
from typing import Any

from gkd_jax.models.base import LanguageModel
from gkd_jax.models.decoder_config import is_rotated
from gkd_jax.models.decoder_only import DecoderOnly
from gkd_jax.models.hf_configs import (
    Family,
    HFConfig,
    decoder_from_hf,
    decoder_to_hf,
    t5_from_hf,
    t5_to_hf,
)
from gkd_jax.models.t5 import T5


def _all_full(config: HFConfig) -> tuple[str, ...]:
    return ("full",) * config["num_hidden_layers"]


def _mistral_kinds(config: HFConfig) -> tuple[str, ...]:
    kind = "sliding" if config.get("sliding_window") else "full"
    return (kind,) * config["num_hidden_layers"]


def _qwen_kinds(config: HFConfig) -> tuple[str, ...]:
    if not config.get("use_sliding_window"):
        return _all_full(config)
    first = config.get("max_window_layers", 28)
    layers = range(config["num_hidden_layers"])
    return tuple("sliding" if layer >= first else "full" for layer in layers)


def _smollm3_kinds(config: HFConfig) -> tuple[str, ...]:
    rotated = _smollm3_rotated(config)
    has_window = config.get("use_sliding_window") and config.get("sliding_window")
    unrotated = "sliding_nope" if has_window else "full_nope"
    return tuple("full" if is_rotated else unrotated for is_rotated in rotated)


def _smollm3_rotated(config: HFConfig) -> list[bool]:
    count, listed = config["num_hidden_layers"], config.get("no_rope_layers")
    if listed is not None:
        # Despite the name, 1 marks a layer with rotary embedding.
        return [bool(one) for one in listed[:count]]
    interval = config.get("no_rope_layer_interval") or 4
    return [bool((layer + 1) % interval) for layer in range(count)]


def _gemma2_kinds(config: HFConfig) -> tuple[str, ...]:
    return tuple("full" if n % 2 else "sliding" for n in range(config["num_hidden_layers"]))


def _gemma3_kinds(config: HFConfig) -> tuple[str, ...]:
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    layers = range(config["num_hidden_layers"])
    return tuple("sliding" if (layer + 1) % period else "full" for layer in layers)


_GEMMA = dict(norm_scale_offset=1.0, scale_embeddings=True)
_GEMMA_DEFAULTS = dict(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)
_GEMMA_FIELDS = ("attention_bias", "hidden_activation")
_GEMMA2_FIELDS = (
    *_GEMMA_FIELDS,
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)

# A model is exported as the last of these families whose `computes` returns True.
_DECODERS = (
    Family(
        model_type="llama",
        class_name="LlamaForCausalLM",
        layer_kinds=_all_full,
        fields=("attention_bias", "mlp_bias"),
        computes=lambda config: True,
    ),
    Family(
        model_type="mistral",
        class_name="MistralForCausalLM",
        layer_kinds=_mistral_kinds,
        fields=("layer_types", "sliding_window"),
        computes=lambda config: config.has_window,
    ),
    Family(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        layer_kinds=_qwen_kinds,
        settings=dict(attention_bias=True, attention_out_bias=False),
        fields=("layer_types",),
        computes=lambda config: config.attention_bias and not config.attention_out_bias,
    ),
    Family(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        layer_kinds=_qwen_kinds,
        settings=dict(qk_norm=True),
        fields=("attention_bias", "layer_types"),
        computes=lambda config: config.qk_norm,
    ),
    Family(
        model_type="smollm3",
        class_name="SmolLM3ForCausalLM",
        layer_kinds=_smollm3_kinds,
        rotated=_smollm3_rotated,
        defaults=dict(rope_theta=2_000_000.0, tie_word_embeddings=True),
        fields=(
            *("attention_bias", "mlp_bias", "layer_types", "no_rope_layers"),
            # Without these fields, transformers uses the ids of the released SmolLM3, which may
            # exceed the vocabulary.
            *("pad_token_id", "bos_token_id", "eos_token_id"),
        ),
        computes=lambda config: not all(map(is_rotated, config.layer_kinds)),
    ),
    Family(
        model_type="gemma",
        class_name="GemmaForCausalLM",
        layer_kinds=_all_full,
        settings=_GEMMA,
        defaults=_GEMMA_DEFAULTS,
        fields=_GEMMA_FIELDS,
        computes=lambda config: bool(config.norm_scale_offset),
    ),
    Family(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        layer_kinds=_gemma2_kinds,
        settings=_GEMMA | dict(post_norms=True),
        defaults=_GEMMA_DEFAULTS,
        fields=(*_GEMMA2_FIELDS, "layer_types"),
        computes=lambda config: bool(config.norm_scale_offset and config.post_norms),
    ),
    Family(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        layer_kinds=_gemma3_kinds,
        settings=_GEMMA | dict(post_norms=True, qk_norm=True),
        defaults=_GEMMA_DEFAULTS | dict(rope_theta=1_000_000.0, rope_local_base_freq=10_000.0),
        fields=(*_GEMMA2_FIELDS, "rope_local_base_freq", "layer_types"),
        computes=lambda config: bool(config.norm_scale_offset and config.qk_norm),
        with_images=("gemma3",),
    ),
)

_BY_MODEL_TYPE = {family.model_type: family for family in _DECODERS}
_TEXT_PARTS = {name: family.model_type for family in _DECODERS for name in family.with_images}
SUPPORTED = ("t5", *_BY_MODEL_TYPE, *_TEXT_PARTS)
"""Values of `model_type` in a `config.json` that can be read."""


def model_from_hf(
    config: HFConfig, *, dtype: str = "bfloat16", dropout_rate: float = 0.0, **options: Any
) -> LanguageModel:
    """Returns the model that a `config.json` describes.

    Args:
      config: the contents of `config.json`.
      dtype: compute dtype, 'float32' or 'bfloat16'.
      dropout_rate: dropout rate in training. The rate in `config.json` is ignored.
      options: `scan_layers` and `remat_policy`, as in the model's configuration.

    Raises:
      ValueError: the architecture, or the value of a field, is not supported; the message names it.
    """
    config = text_part(config)
    model_type = config.get("model_type")
    options = {"dtype": dtype, "dropout_rate": dropout_rate, **options}
    if model_type == "t5":
        return T5(dataclasses.replace(t5_from_hf(config), **options))
    if model_type in _BY_MODEL_TYPE:
        described = decoder_from_hf(_BY_MODEL_TYPE[model_type], config)
        return DecoderOnly(dataclasses.replace(described, **options))
    raise ValueError(
        f"model_type {model_type!r} of config.json is not supported; supported are "
        f"{', '.join(SUPPORTED)}. Choose a checkpoint of one of these architectures."
    )


def text_part(config: HFConfig) -> HFConfig:
    """Returns the part of a `config.json` that describes the language model.

    If the model also takes images, the returned part is its `text_config`, with the model type of
    the language model. Any other `config.json` is returned unchanged.
    """
    model_type = _TEXT_PARTS.get(config.get("model_type", ""))
    if model_type is None:
        return config
    return {"model_type": model_type} | dict(config["text_config"])


def model_to_hf(model: LanguageModel) -> dict[str, Any]:
    """Returns the `config.json` of a model, in a form that `transformers` 4 and 5 both read.

    Raises:
      ValueError: no architecture of Hugging Face has the model's combination of settings.
    """
    if isinstance(model, T5):
        described = t5_to_hf(model.config)
    elif isinstance(model, DecoderOnly):
        family = next(one for one in reversed(_DECODERS) if one.computes(model.config))
        described = decoder_to_hf(family, model.config)
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
