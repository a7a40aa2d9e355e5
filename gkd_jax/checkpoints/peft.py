"""LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors."""

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
    """Checks that exported adapters can be loaded onto their base model.

    Exported adapters contain the names of the modules that they belong to. In a model that also
    takes images, `transformers` gives these modules different names.

    Args:
      path: path or name of the base model; None if it is not known.

    Raises:
      ValueError: the student is the text part of a model that also takes images.
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
    """Writes float32 adapters that `peft.PeftModel.from_pretrained` loads onto their base model.

    Args:
      folder: a local directory; created if it does not exist.
      model: model that the adapters belong to.
      adapters: the matrices A [in, rank] and B [rank, out] of each adapted matrix product. They are
        fetched from the devices one at a time.
      base: path or name of the base model, stored as information for the user.

    Returns:
      The names of the written files.

    Raises:
      ValueError: no supported Hugging Face architecture corresponds to the base model.
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
    # PEFT stores matrices as [out, in].
    tensors = (
        (name, np.asarray(jax.device_get(matrix), kind).T) for name, matrix in matrices.items()
    )
    safetensors_files.write_file(folder / WEIGHTS, shapes, tensors)
    return [CONFIG, WEIGHTS]


def _module(path: str, model: LoRA) -> str:
    """Returns the Hugging Face name of the module at a parameter path of this package."""
    return hf_names.hf_tensor(f"{path}/kernel", model.config).names[0].removesuffix(".weight")


def _modules(model: LoRA, products: Mapping[str, Any]) -> set[str]:
    """Returns the module names of matrix products. Stacked layers have one name per layer."""
    return {
        _module(name, model)
        for path, (shape, _) in products.items()
        for name in (stacking.names_of_layers(path, shape[0]) if len(shape) == 3 else [path])
    }


def _target_modules(model: LoRA) -> list[str]:
    """Returns the names by which PEFT finds the adapted modules.

    PEFT matches a short name, such as 'q_proj', with all modules whose names end in it. If this
    would match modules without adapters, full module names are returned instead of short ones.
    """
    wanted = _modules(model, model.kernels)
    every = _modules(model, lora.products(model.model))
    ends = {name.rpartition(".")[2] for name in wanted}
    if all(name in wanted for name in every if name.rpartition(".")[2] in ends):
        return sorted(ends)
    return sorted(wanted)
