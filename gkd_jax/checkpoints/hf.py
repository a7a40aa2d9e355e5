"""Hugging Face checkpoints: a directory with config.json and weights in safetensors.

Weights are read by memory map, one tensor at a time, onto the sharding and in the dtype wanted.
Pickled weights are never loaded.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from gkd_jax.checkpoints import layout, safetensors_files
from gkd_jax.checkpoints.safetensors_files import StoredTensor
from gkd_jax.checkpoints.sharded_reads import read_sharded
from gkd_jax.common import hub
from gkd_jax.common.array_types import Params, PyTree
from gkd_jax.models import families, hf_names, stacking
from gkd_jax.models.base import LanguageModel

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What beside the weights a directory may hold that a student of its vocabulary needs too."""

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def hf_model(
    path: str,
    *,
    dtype: str = "bfloat16",
    dropout_rate: float = 0.0,
    scan_layers: bool = False,
    remat_policy: str = "none",
) -> LanguageModel:
    """The model that a checkpoint's config.json describes; its parameters are not read.

    Args:
      path: a directory, or a name on the Hugging Face hub.
      dtype: compute dtype, 'float32' or 'bfloat16'.
      dropout_rate: in training.
      scan_layers: whether layers run as one loop, their parameters stacked: see `DecoderConfig`.
      remat_policy: which activations are computed again: see `DecoderConfig`.

    Raises:
      FileNotFoundError: there is no such directory, or no config.json in it.
      ValueError: the architecture, or a setting of it, is not supported.
    """
    folder = hub.find(path)
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} holds no {CONFIG}, by which a Hugging Face checkpoint is known. Give the "
            "directory that `save_pretrained` wrote."
        )
    try:
        return families.model_from_hf(
            read_config(folder), dtype=dtype, dropout_rate=dropout_rate, scan_layers=scan_layers,
            remat_policy=remat_policy,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def is_hf_checkpoint(folder: epath.Path) -> bool:
    """Whether there is a config.json, as all of them have."""
    return (folder / CONFIG).is_file()


def read_config(folder: epath.Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
      ValueError: it is not JSON.
    """
    try:
        return dict(json.loads((folder / CONFIG).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be read: {error}. Copy the checkpoint again."
        ) from error


def shapes(folder: epath.Path) -> layout.Shapes:
    """Shape and dtype of each parameter by our name, from config.json and the files' headers.

    Raises:
      FileNotFoundError, CorruptCheckpointError: a file is missing or damaged.
      ValueError: the architecture is not supported, or tensors are missing or unknown.
    """
    return {
        name: (_shape(stored, is_transposed), str(stored.dtype))
        for name, (stored, is_transposed) in _stored(folder).items()
    }


def read_hf_params(folder: epath.Path, abstract_params: PyTree[jax.ShapeDtypeStruct]) -> Params:
    """Reads parameters, one tensor at a time, into the dtype and sharding wanted.

    Raises:
      As `shapes`; a ValueError names a parameter of another shape.
    """
    stored = _stored(folder)
    wanted = layout.shapes_of(abstract_params)
    held = {name: (_shape(one, turned), str(one.dtype)) for name, (one, turned) in stored.items()}
    layout.check_shapes(held, wanted, folder=folder)
    leaves, treedef = jax.tree_util.tree_flatten(abstract_params)
    arrays = []
    for name, leaf in zip(wanted, leaves, strict=True):
        one, is_transposed = stored[name]
        tensor = one.open()
        arrays.append(read_sharded(name, tensor.T if is_transposed else tensor, leaf, folder))
    return jax.tree_util.tree_unflatten(treedef, arrays)


def write_hf_checkpoint(
    folder: epath.Path,
    model: LanguageModel,
    params: Params,
    *,
    dtype: str = "bfloat16",
    config: dict[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Writes what `transformers` loads with `from_pretrained`: config.json and weights.

    Args:
      folder: a local directory, made if it is not there.
      model: whose parameters they are.
      params: fetched from the devices one at a time.
      dtype: of the weights written, 'float32' or 'bfloat16'.
      config: the config.json of the checkpoint that the model came from, whose further fields are
        kept; None writes the fields that the model has.
      shard_bytes: most bytes of a file.

    Returns:
      The names of the files written.

    Raises:
      ValueError: no architecture of Hugging Face's is this model.
    """
    described = dict(families.model_to_hf(model))
    if config is not None:
        described = dict(families.text_part(config))
    described.pop("torch_dtype", None)
    described["dtype"] = described["torch_dtype"] = dtype
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")

    # A layer at a time leaves the devices.
    params = stacking.unstack(params)
    names = layout.shapes_of(params)
    places = {name: hf_names.hf_tensor(name, model.config) for name in names}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
            place = places[name]
            value = np.asarray(jax.device_get(leaf)).astype(_DTYPES[dtype])
            yield place.names[0], value.T if place.is_transposed else value

    written = {
        places[name].names[0]: (
            shape[::-1] if places[name].is_transposed else shape,
            _DTYPES[dtype],
        )
        for name, (shape, _) in names.items()
    }
    files = safetensors_files.write_directory(folder, written, tensors(), shard_bytes=shard_bytes)
    return [CONFIG, *files]


def _stored(folder: epath.Path) -> dict[str, tuple[StoredTensor, bool]]:
    """Each of our parameters to the tensor that holds it, and whether that is transposed."""
    model = hf_model(os.fspath(folder))
    config = model.config
    tensors = safetensors_files.read_directory(folder)
    found: dict[str, tuple[StoredTensor, bool]] = {}
    used: set[str] = set()
    missing = []
    for name in layout.shapes_of(model.abstract_params()):
        place = hf_names.hf_tensor(name, config)
        present = [one for one in place.names if one in tensors]
        used.update(present)
        if present:
            found[name] = (tensors[present[0]], place.is_transposed)
        else:
            missing.append(place.names[0])
    unknown = sorted(name for name in set(tensors) - used if not hf_names.is_left_out(name, config))
    _check_tied(folder, tensors, found)
    for names, what in ((missing, "lacks"), (unknown, "has, beside those of its architecture,")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{folder} {what} {', '.join(names[:3])}{more}: its weights are not those of its "
                f"{CONFIG} ({read_config(folder).get('model_type')}). Copy the checkpoint again, "
                "or choose another."
            )
    return found


def _check_tied(
    folder: epath.Path,
    tensors: dict[str, StoredTensor],
    found: dict[str, tuple[StoredTensor, bool]],
) -> None:
    """Refuses an output layer of its own where the model would take the embedding for it."""
    head, embedding = tensors.get("lm_head.weight"), found.get("token_embedder/embedding")
    if head is None or embedding is None or any(one is head for one, _ in found.values()):
        return
    if not np.array_equal(head.open(), embedding[0].open()):
        raise ValueError(
            f"{folder} has an output layer (lm_head.weight) that differs from its embedding, which "
            f"its {CONFIG} calls tied to it. Set tie_word_embeddings to false there if the model "
            "was trained so."
        )


def _shape(stored: StoredTensor, is_transposed: bool) -> tuple[int, ...]:
    return stored.shape[::-1] if is_transposed else stored.shape
