"""Language models as pure functions of their parameters, with logical axis names.

Models do not depend on losses, samplers or meshes. Of the other subpackages, they import only
`common`. Start with `base`, the interface that rollouts and losses call. Then read one of the
networks, `decoder_only` or `t5`, and `linen`, which wraps a network in pure functions.
`layer_loops` runs the layers, `families` translates Hugging Face's `config.json`, and `sizes` has
the configurations of released models. `wrapper`, `lora`, `quantised` and `ensembles` define models
that wrap or combine other models.
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
