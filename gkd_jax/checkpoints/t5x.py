"""Parameters in T5X's checkpoints: read from native and Orbax ones, written to native ones.

Native (T5X's `checkpoints.Checkpointer`, version 3): a msgpack file `checkpoint` with the tree
`{'version', 'optimizer': {'target', 'state'}}`, whose leaves are small arrays or TensorStore
specs of Zarr arrays beside it. Orbax (T5X's `OrbaxCheckpointManagerInterface`): an item `state`
with the same tree, all arrays in one OCDBT database. Only `target`, the parameters, is read; what
is written has besides it the step, and no state of an optimizer.
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

Leaves = dict[str, Any]
"""Parameter name such as 'encoder/layers_0/mlp/wo/kernel' to an array or a TensorStore spec."""


def is_t5x_checkpoint(path: epath.PathLike) -> str | None:
    """Tells whether `path` holds a T5X checkpoint.

    Args:
      path: a checkpoint (`.../checkpoint_2000`), or the folder of several; local or `gs://`.

    Returns:
      'native', 'orbax', or None for anything else, a missing path included.

    Raises:
      ValueError: Orbax's description of the arrays is damaged.
    """
    folder = _find_step(epath.Path(path))
    return None if folder is None else _kind(folder)


def read_t5x_params(path: epath.PathLike, abstract_params: PyTree[jax.ShapeDtypeStruct]) -> Params:
    """Reads parameters, one array at a time, into the dtype and sharding wanted.

    Each host reads only the parts that its devices hold. Optimizer states are left out.

    Args:
      path: a checkpoint, or the folder of several, of which the last step is read.
      abstract_params: nested dictionaries of `jax.ShapeDtypeStruct`: the tree to read, with the
        dtype and, where given, the sharding of each array.

    Returns:
      The parameters, in the tree of `abstract_params`.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: `path` is no T5X checkpoint; a parameter is missing, has another shape, or is
        not known to the model; a file is damaged.
    """
    root = epath.Path(path)
    if not root.exists():
        raise FileNotFoundError(
            f"path of a T5X checkpoint must exist; got {root}. Give the folder of a checkpoint, "
            "such as gs://bucket/model/checkpoint_1000000, or the folder of several."
        )
    folder = _find_step(root)
    kind = None if folder is None else _kind(folder)
    if folder is None or kind is None:
        raise ValueError(
            f"path must hold a T5X checkpoint; got {root}, which has neither a file 'checkpoint' "
            "(native) nor a folder 'state' with T5X's parameters (Orbax), nor folders "
            "checkpoint_<step> with them. Give the folder that T5X wrote."
        )
    stored = _native_leaves(folder) if kind == NATIVE else _orbax_leaves(folder)
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_params)
    wanted = {"/".join(str(key.key) for key in keys): leaf for keys, leaf in with_paths}
    _check_names(folder, stored=set(stored), wanted=set(wanted))
    arrays = [read_sharded(name, stored[name], wanted[name], folder) for name in wanted]
    return jax.tree_util.tree_unflatten(treedef, arrays)


def write_t5x_checkpoint(folder: epath.Path, params: Params, *, step: int, dtype: str) -> None:
    """Writes a native checkpoint of parameters: T5X's `Checkpointer` restores it.

    Args:
      folder: a local directory `checkpoint_<step>`, made if it is not there.
      params: in T5X's tree; fetched from the devices one at a time.
      step: number of updates that made them.
      dtype: of the arrays, 'float32' or 'bfloat16'.
    """
    from flax import serialization

    folder.mkdir(parents=True, exist_ok=True)

    def write(path: Any, leaf: jax.Array) -> dict[str, Any]:
        name = ".".join(("target", *(str(key.key) for key in path)))
        return _write_array(
            folder, name, np.asarray(jax.device_get(leaf)).astype(jax.numpy.dtype(dtype))
        )

    contents = {
        "version": _VERSION,
        "optimizer": {
            "target": jax.tree_util.tree_map_with_path(write, params),
            "state": {"step": np.asarray(step, np.int32)},
        },
    }
    # Last: without this file the folder is no checkpoint.
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))


def _write_array(folder: epath.Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """Writes one Zarr array; returns its spec, whose path is within the checkpoint's folder."""
    import tensorstore

    row_bytes = max(1, array[:1].nbytes)
    rows = max(1, min(len(array), _CHUNK_BYTES // row_bytes))
    metadata = {
        "compressor": {"id": "gzip", "level": 1},
        "shape": list(array.shape),
        "chunks": [rows, *array.shape[1:]],
    }
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    # Zeros are written too: a chunk that is missing is then one that was lost.
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
    # Other programs name an item `state` as well: T5X's has `target` in it.
    return ORBAX if _orbax_names(folder) else None


def _find_step(root: epath.Path) -> epath.Path | None:
    """Returns `root` if it is one checkpoint, or the checkpoint of the last step in it."""
    if (root / "checkpoint").is_file() or (root / "state").is_dir():
        return root
    if not root.is_dir():
        return None
    steps = {}
    for child in root.iterdir():
        # Unfinished ones have a suffix, such as checkpoint_100.orbax-checkpoint-tmp-1.
        match = _STEP_FOLDER.fullmatch(child.name)
        if match and _kind(child):
            steps[int(match[1])] = child
    return steps[max(steps)] if steps else None


def _native_leaves(folder: epath.Path) -> Leaves:
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
    leaves: Leaves = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, Mapping) and "kvstore" not in node:
            for key, child in node.items():
                visit(f"{name}/{key}" if name else key, child)
        elif isinstance(node, Mapping):
            # Older TensorStore specs have the path outside of `kvstore`.
            stored_path = node["kvstore"].get("path") or node["path"]
            leaves[name] = {
                "driver": node["driver"],
                "kvstore": _kvstore(folder / stored_path.rstrip("/")),
            }
        else:
            leaves[name] = np.asarray(node)

    visit("", target)
    return leaves


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
        tuple(str(part["key"]) for part in entry["key_metadata"])
        for entry in _orbax_metadata(folder).get("tree_metadata", {}).values()
    ]
    return [key[1:] for key in keys if key[0] == "target"]


def _orbax_leaves(folder: epath.Path) -> Leaves:
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
    """Returns TensorStore's key-value store of a folder, local or in a bucket."""
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
    # A model with fewer layers would otherwise load, and be another model.
    if unknown := sorted(stored - wanted):
        raise ValueError(
            f"the checkpoint must have the parameters of the model only; {folder} has "
            f"{_some(unknown)} besides. {remedy}"
        )


def _some(names: list[str], *, at_most: int = 5) -> str:
    shown = ", ".join(names[:at_most])
    rest = len(names) - at_most
    return f"{shown} and {rest} more" if rest > 0 else shown
