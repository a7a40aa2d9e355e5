"""Language models as pure functions of their parameters, with logical axis names.

They know no loss, sampler or mesh. Start with `base`, which says what a family gives to rollouts
and losses; `t5` and `decoder_only` are the networks, `families` reads a config.json of Hugging
Face.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {
    "t5": ("T5",),
    "t5_config": ("T5Config",),
    "decoder_only": ("DecoderOnly",),
    "decoder_config": (
        "DecoderConfig",
        "Rope",
    ),
    "lora": ("LoRA",),
}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
