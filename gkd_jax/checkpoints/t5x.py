"""T5X checkpoints: reads parameters from native and Orbax checkpoints, writes native ones.

Native checkpoints (T5X's `checkpoints.Checkpointer`, version 3) have a msgpack file `checkpoint`
with the tree `{'version', 'optimizer': {'target', 'state'}}`. The leaves of this tree are small
arrays, or TensorStore specs of Zarr arrays that are stored next to the file. Orbax checkpoints
(T5X's `OrbaxCheckpointManagerInterface`) have an item `state` with the same tree and all arrays in
one OCDBT database. Only the subtree `target`, which holds the parameters, is read. Written
checkpoints hold the parameters and the step, but no optimizer state.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from gkd_jax.checkpoints.sharded_reads import DAMAGED, read_sharded
from gkd_jax.common.array_types import Params, PyTree

NATIVE = "native"
ORBAX = "orbax"
_VERSION = 3
_CHUNK_BYTES = 64 << 20

_STEP_FOLDER = re.compile(r"checkpoint_(\d+)")

StoredArrays = dict[str, Any]
"""Arrays or TensorStore specs by parameter name, such as 'encoder/layers_0/mlp/wo/kernel'."""


def is_t5x_checkpoint(path: epath.PathLike) -> str | None:
    """Returns the format of a T5X checkpoint.

    Args:
      path: a checkpoint (`.../checkpoint_2000`) or a folder of checkpoints, local or `gs://`.

    Returns:
      'native', 'orbax', or None if `path` is not a T5X checkpoint or does not exist.

    Raises:
      ValueError: Orbax's metadata of the arrays is damaged.
    """
    folder = find_step(epath.Path(path))
    return None if folder is None else _kind(folder)


def read_t5x_params(path: epath.PathLike, abstract_params: PyTree[jax.ShapeDtypeStruct]) -> Params:
    """Reads parameters one array at a time; converts them to the requested dtypes and shardings.

    Each host reads only the slices that its devices hold. The optimizer state is not read.

    Args:
      path: a checkpoint, or a folder of checkpoints, of which the last step is read.
      abstract_params: nested dictionaries of `jax.ShapeDtypeStruct`: the tree to read, with the
        dtype and, optionally, the sharding of each array.

    Returns:
      The parameters in the tree of `abstract_params`.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: `path` is not a T5X checkpoint; a parameter is missing, has another shape, or is
        unknown to the model; or a file is damaged.
    """
    root = epath.Path(path)
    if not root.exists():
        raise FileNotFoundError(
            f"path of a T5X checkpoint must exist; got {root}. Give the folder of a checkpoint, "
            "such as gs://bucket/model/checkpoint_1000000, or the folder of several."
        )
    folder = find_step(root)
    kind = None if folder is None else _kind(folder)
    if folder is None or kind is None:
        raise ValueError(
            f"path must hold a T5X checkpoint; got {root}, which has neither a file 'checkpoint' "
            "(native) nor a folder 'state' with T5X's parameters (Orbax), nor folders "
            "checkpoint_<step> with them. Give the folder that T5X wrote."
        )
    stored = native_arrays(folder) if kind == NATIVE else orbax_arrays(folder)
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_params)
    wanted = {"/".join(str(key.key) for key in keys): abstract for keys, abstract in with_paths}
    _check_names(folder, stored=set(stored), wanted=set(wanted))
    arrays = [read_sharded(name, stored[name], wanted[name], folder) for name in wanted]
    return jax.tree_util.tree_unflatten(treedef, arrays)


def write_t5x_checkpoint(folder: epath.Path, params: Params, *, step: int, dtype: str) -> None:
    """Writes parameters as a native checkpoint, which T5X's `Checkpointer` restores.

    Args:
      folder: a local directory `checkpoint_<step>`; created if it does not exist.
      params: parameters in T5X's tree, fetched from the devices one at a time.
      step: number of updates made.
      dtype: dtype of the written arrays, 'float32' or 'bfloat16'.
    """
    from flax import serialization

    folder.mkdir(parents=True, exist_ok=True)

    def write(path: Any, array: jax.Array) -> dict[str, Any]:
        name = ".".join(("target", *(str(key.key) for key in path)))
        return _write_array(
            folder, name, np.asarray(jax.device_get(array)).astype(jax.numpy.dtype(dtype))
        )

    contents = {
        "version": _VERSION,
        "optimizer": {
            "target": jax.tree_util.tree_map_with_path(write, params),
            "state": {"step": np.asarray(step, np.int32)},
        },
    }
    # This file is written last, because a folder without it does not count as a checkpoint.
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))


def _write_array(folder: epath.Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """Writes a Zarr array; returns its TensorStore spec with a path relative to the checkpoint."""
    import tensorstore

    row_bytes = max(1, array[:1].nbytes)
    rows = max(1, min(len(array), _CHUNK_BYTES // row_bytes))
    metadata = {
        "compressor": {"id": "gzip", "level": 1},
        "shape": list(array.shape),
        "chunks": [rows, *array.shape[1:]],
    }
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    # Chunks of zeros are written too, so that a missing chunk always means a damaged checkpoint.
    complete = {**spec, "store_data_equal_to_fill_value": True, "kvstore": _kvstore(folder / name)}
    store = tensorstore.open(complete, create=True).result()
    store.write(array).result()
    return {**spec, "kvstore": {"driver": "file", "path": f"{name}/"}}


def _kind(folder: epath.Path) -> str | None:
    if (folder / "checkpoint").is_file():
        return NATIVE
    state = folder / "state"
    if not (state / "manifest.ocdbt").is_file() or not (state / "_METADATA").is_file():
        return None
    # Other programs also write an item `state`. Only T5X's item contains `target`.
    return ORBAX if _orbax_names(folder) else None


def find_step(root: epath.Path) -> epath.Path | None:
    """Returns `root` if it is a checkpoint, else the last checkpoint in it; None if none exists."""
    if (root / "checkpoint").is_file() or (root / "state").is_dir():
        return root
    if not root.is_dir():
        return None
    steps = {}
    for child in root.iterdir():
        # Unfinished checkpoints have a suffix, such as checkpoint_100.orbax-checkpoint-tmp-1.
        match = _STEP_FOLDER.fullmatch(child.name)
        if match and _kind(child):
            steps[int(match[1])] = child
    return steps[max(steps)] if steps else None


def native_arrays(folder: epath.Path) -> StoredArrays:
    """Returns the stored parameters of a native checkpoint."""
    import msgpack
    from flax import serialization

    file = folder / "checkpoint"
    try:
        contents = serialization.msgpack_restore(file.read_bytes())
        target = contents["optimizer"]["target"]
    except (ValueError, KeyError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(
            f"{file} must be T5X's msgpack file with optimizer/target in it; reading it failed: "
            f"{error!r}. {DAMAGED}"
        ) from error
    arrays: StoredArrays = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, Mapping) and "kvstore" not in node:
            for key, child in node.items():
                visit(f"{name}/{key}" if name else key, child)
        elif isinstance(node, Mapping):
            # Older TensorStore specs have the path outside `kvstore`.
            stored_path = node["kvstore"].get("path") or node["path"]
            arrays[name] = {
                "driver": node["driver"],
                "kvstore": _kvstore(folder / stored_path.rstrip("/")),
            }
        else:
            arrays[name] = np.asarray(node)

    visit("", target)
    return arrays


def _orbax_metadata(folder: epath.Path) -> dict[str, Any]:
    file = folder / "state" / "_METADATA"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must be Orbax's JSON description of the arrays; reading it failed: "
            f"{error!r}. {DAMAGED}"
        ) from error


def _orbax_names(folder: epath.Path) -> list[tuple[str, ...]]:
    keys = [
        tuple(str(key["key"]) for key in entry["key_metadata"])
        for entry in _orbax_metadata(folder).get("tree_metadata", {}).values()
    ]
    return [key[1:] for key in keys if key[0] == "target"]


def orbax_arrays(folder: epath.Path) -> StoredArrays:
    """Returns the stored parameters of an Orbax checkpoint."""
    driver = "zarr3" if _orbax_metadata(folder).get("use_zarr3") else "zarr"
    base = _kvstore(folder / "state")
    return {
        "/".join(name): {
            "driver": driver,
            "kvstore": {
                "driver": "ocdbt",
                "base": base,
                "path": ".".join(("target", *name)) + "/",
            },
        }
        for name in _orbax_names(folder)
    }


def _kvstore(folder: epath.Path) -> dict[str, str]:
    """Returns the TensorStore key-value store spec of a folder, local or in a bucket."""
    name = str(folder)
    for driver, scheme in (("gcs", "gs://"), ("s3", "s3://")):
        if name.startswith(scheme):
            bucket, _, path = name.removeprefix(scheme).partition("/")
            return {"driver": driver, "bucket": bucket, "path": path + "/"}
    return {"driver": "file", "path": str(folder.resolve()) + "/"}


def _check_names(folder: epath.Path, *, stored: set[str], wanted: set[str]) -> None:
    remedy = "Check that the model's sizes and variant are those of the checkpoint."
    if missing := sorted(wanted - stored):
        raise ValueError(
            f"the checkpoint must have every parameter of the model; {folder} lacks "
            f"{_some(missing)}. {remedy}"
        )
    # Without this check, a model with fewer layers than the checkpoint would load without an error.
    if unknown := sorted(stored - wanted):
        raise ValueError(
            f"the checkpoint must have the parameters of the model only; {folder} has "
            f"{_some(unknown)} besides. {remedy}"
        )


def _some(names: list[str], *, at_most: int = 5) -> str:
    shown = ", ".join(names[:at_most])
    rest = len(names) - at_most
    return f"{shown} and {rest} more" if rest > 0 else shown
