"""Hugging Face checkpoints: directories with a config.json and weights in safetensors files.

Weights are memory-mapped. They are read one tensor at a time and converted to the requested dtype
and sharding. Pickled weights are never loaded.
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
"""Files of a tokenizer in a Hugging Face checkpoint. An export copies them from the directory of
the student's tokenizer."""

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def hf_model(
    path: str,
    *,
    dtype: str = "bfloat16",
    dropout_rate: float = 0.0,
    scan_layers: bool = False,
    remat_policy: str = "none",
) -> LanguageModel:
    """Builds the model that a checkpoint's config.json describes, without reading parameters.

    Args:
      path: a directory, or the name of a model on the Hugging Face hub.
      dtype: compute dtype, 'float32' or 'bfloat16'.
      dropout_rate: dropout rate in training.
      scan_layers: whether layers run as one loop over stacked parameters; see `DecoderConfig`.
      remat_policy: which activations are recomputed in the backward pass; see `DecoderConfig`.

    Raises:
      FileNotFoundError: the directory does not exist or has no config.json.
      ValueError: the architecture, or one of its settings, is not supported.
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
    """Returns whether a folder is a Hugging Face checkpoint, i.e. contains a config.json."""
    return (folder / CONFIG).is_file()


def read_config(folder: epath.Path) -> dict[str, Any]:
    """Returns the contents of config.json.

    Raises:
      ValueError: the file is not JSON.
    """
    try:
        return dict(json.loads((folder / CONFIG).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be read: {error}. Copy the checkpoint again."
        ) from error


def shapes(folder: epath.Path) -> layout.Shapes:
    """Returns the shape and dtype of each parameter, by its name in this package.

    Reads only config.json and the headers of the weight files.

    Raises:
      FileNotFoundError, CorruptCheckpointError: a file is missing or damaged.
      ValueError: the architecture is not supported, or tensors are missing or unknown.
    """
    return {
        name: (_shape(stored, is_transposed), str(stored.dtype))
        for name, (stored, is_transposed) in _stored(folder).items()
    }


def read_hf_params(folder: epath.Path, abstract_params: PyTree[jax.ShapeDtypeStruct]) -> Params:
    """Reads parameters one tensor at a time; converts them to the requested dtypes and shardings.

    Raises:
      The errors of `shapes`.
      ValueError: stored and requested shapes differ; the message names the parameters.
    """
    stored = _stored(folder)
    wanted = layout.shapes_of(abstract_params)
    held = {name: (_shape(one, turned), str(one.dtype)) for name, (one, turned) in stored.items()}
    layout.check_shapes(held, wanted, folder=folder)
    abstract_arrays, treedef = jax.tree_util.tree_flatten(abstract_params)
    arrays = []
    for name, abstract in zip(wanted, abstract_arrays, strict=True):
        one, is_transposed = stored[name]
        tensor = one.open()
        arrays.append(read_sharded(name, tensor.T if is_transposed else tensor, abstract, folder))
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
    """Writes config.json and weights that `from_pretrained` of `transformers` loads.

    Args:
      folder: a local directory; created if it does not exist.
      model: model that the parameters belong to.
      params: parameters, fetched from the devices one at a time.
      dtype: dtype of the written weights, 'float32' or 'bfloat16'.
      config: contents of the config.json in the checkpoint that the model was loaded from. All
        fields except for the dtype are written unchanged. If that checkpoint is of a model that
        also takes images, only the fields of its text part are written. If `config` is None, only
        the fields that follow from `model` are written.
      shard_bytes: maximum size of a weight file in bytes.

    Returns:
      The names of the written files.

    Raises:
      ValueError: no supported Hugging Face architecture corresponds to the model.
    """
    described = dict(families.model_to_hf(model))
    if config is not None:
        described = dict(families.text_part(config))
    described.pop("torch_dtype", None)
    described["dtype"] = described["torch_dtype"] = dtype
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")

    # Stacked layers are separated, so that only one layer at a time is copied from the devices.
    params = stacking.unstack(params)
    names = layout.shapes_of(params)
    targets = {name: hf_names.hf_tensor(name, model.config) for name in names}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in zip(names, jax.tree.leaves(params), strict=True):
            target = targets[name]
            value = np.asarray(jax.device_get(array)).astype(_DTYPES[dtype])
            yield target.names[0], value.T if target.is_transposed else value

    written = {
        targets[name].names[0]: (
            shape[::-1] if targets[name].is_transposed else shape,
            _DTYPES[dtype],
        )
        for name, (shape, _) in names.items()
    }
    files = safetensors_files.write_directory(folder, written, tensors(), shard_bytes=shard_bytes)
    return [CONFIG, *files]


def _stored(folder: epath.Path) -> dict[str, tuple[StoredTensor, bool]]:
    """Returns the tensor that stores each parameter, and whether that tensor is transposed."""
    model = hf_model(os.fspath(folder))
    config = model.config
    tensors = safetensors_files.read_directory(folder)
    found: dict[str, tuple[StoredTensor, bool]] = {}
    used: set[str] = set()
    missing = []
    for name in layout.shapes_of(model.abstract_params()):
        source = hf_names.hf_tensor(name, config)
        present = [one for one in source.names if one in tensors]
        used.update(present)
        if present:
            found[name] = (tensors[present[0]], source.is_transposed)
        else:
            missing.append(source.names[0])
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
    """Checks that a stored output layer equals the embedding, for a model that ties the two.

    Raises:
      ValueError: the output layer differs from the embedding.
    """
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
