"""Adapters as Hugging Face's PEFT keeps them: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from gkd_jax.checkpoints import hf, safetensors_files
from gkd_jax.common import hub
from gkd_jax.common.array_types import Params
from gkd_jax.models import families, hf_names, lora, stacking
from gkd_jax.models.lora import LoRA, pairs_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def check_base_architecture(path: str | None) -> None:
    """Refuses a base in which transformers calls the products otherwise than we do.

    Raises:
      ValueError: it is the text part of a model that sees images.
    """
    folder = None if path is None else hub.find(path)
    if folder is None or not hf.is_hf_checkpoint(folder):
        return
    config = hf.read_config(folder)
    if families.text_part(config) is not config:
        raise ValueError(
            f"Export.adapters cannot be loaded onto {path}, a {config['model_type']}, of which the "
            "student is the text part. Set it (EXPORT_ADAPTERS) to False to export the whole model."
        )


def write_adapters(
    folder: epath.Path, model: LoRA, adapters: Params, *, base: str | None
) -> list[str]:
    """Writes adapters that `peft.PeftModel.from_pretrained` loads onto their base, in float32.

    Args:
      folder: a local directory, made if it is not there.
      model: whose adapters they are.
      adapters: A [in, rank] and B [rank, out] of each product, fetched one at a time.
      base: path or name of the base, which PEFT keeps for the reader.

    Returns:
      The names of the files written.

    Raises:
      ValueError: no architecture of Hugging Face's is the base.
    """
    architecture = families.model_to_hf(model.model)["model_type"]
    contents = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if architecture == "t5" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.rank,
        "lora_alpha": model.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _target_modules(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")
    matrices = {
        f"base_model.model.{_module(path, model)}.{name}.weight": matrix
        for path, pair in pairs_of(stacking.unstack(adapters)).items()
        for name, matrix in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    kind = np.dtype(np.float32)
    shapes = {name: (matrix.shape[::-1], kind) for name, matrix in matrices.items()}
    # PEFT's are [out, in].
    tensors = (
        (name, np.asarray(jax.device_get(matrix), kind).T) for name, matrix in matrices.items()
    )
    safetensors_files.write_file(folder / WEIGHTS, shapes, tensors)
    return [CONFIG, WEIGHTS]


def _module(path: str, model: LoRA) -> str:
    """Hugging Face's name of the module whose product a path of ours is."""
    return hf_names.hf_tensor(f"{path}/kernel", model.config).names[0].removesuffix(".weight")


def _modules(model: LoRA, products: Mapping[str, Any]) -> set[str]:
    """Names of the modules of products, of all layers where these are stacked."""
    return {
        _module(name, model)
        for path, (shape, _) in products.items()
        for name in (stacking.names_of_layers(path, shape[0]) if len(shape) == 3 else [path])
    }


def _target_modules(model: LoRA) -> list[str]:
    """The last parts of the modules' names where these name no others too, or else all of them."""
    wanted = _modules(model, model.kernels)
    every = _modules(model, lora.products(model.model))
    ends = {name.rpartition(".")[2] for name in wanted}
    if all(name in wanted for name in every if name.rpartition(".")[2] in ends):
        return sorted(ends)
    return sorted(wanted)
