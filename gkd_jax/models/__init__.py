"""Language models as pure functions of their parameters, with logical axis names.

Models know nothing of losses, samplers or meshes, and import nothing but `common`. Start with
`base`, the interface that rollouts and losses call, then `decoder_only` (or `t5`), a network, and
`linen`, which wraps it. `layer_loops` runs the layers, `families` translates Hugging Face's
`config.json`, `sizes` has published sizes, and `wrapper`, `lora`, `quantised` and `ensembles` are
models made of other models.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {
    "base": ("LanguageModel",),
    "decoder_config": ("DecoderConfig", "Rope"),
    "decoder_only": ("DecoderOnly",),
    "ensembles": ("MixtureModel",),
    "families": ("model_from_hf", "model_to_hf"),
    "lora": ("LoRA",),
    "quantised": ("Int8",),
    "t5": ("T5",),
    "t5_config": ("T5Config",),
    "wrapper": ("restrict_vocabulary",),
}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
