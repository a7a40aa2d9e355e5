"""Layout of a checkpoint folder: its files, its header, and reading arrays from it.

checkpoint_1000/
  arrays/         arrays of the tree, written by Orbax, independent of the mesh
  host.json       format version, kind, step, names and shapes of the arrays, values of the caller
  MANIFEST.json   digests of arrays/ and host.json, written last
  UNFINISHED      exists only while the checkpoint is being written or deleted
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gkd_jax.checkpoints.manifest import (
    MANIFEST,
    CorruptCheckpointError,
    write_durably,
    write_manifest,
)
from gkd_jax.common.array_types import PyTree
from gkd_jax.models import stacking

ARRAYS = "arrays"
HOST = "host.json"
UNFINISHED = "UNFINISHED"
FORMAT_VERSION = 1

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Maps the name of an array, such as 'params/decoder/norm/scale', to its shape and dtype."""


@dataclasses.dataclass(frozen=True)
class Header:
    """Contents of host.json.

    Attributes:
      kind: 'state' (a training state) or 'params' (parameters only).
      step: number of updates made; None for exported parameters.
      shapes: shape and dtype of each array of the tree.
      metric: value that decides which checkpoint is the best; None if it was not measured.
      host: JSON values given by the caller.
    """

    kind: str
    step: int | None
    shapes: Shapes
    metric: float | None
    host: dict[str, Any]

    def dump(self) -> str:
        """Returns the header as JSON text.

        Raises:
          ValueError: `host` is not JSON.
        """
        try:
            return json.dumps(
                {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)},
                indent=1,
                default=_plain,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the host's part of a checkpoint must be JSON; got {self.host!r}: {error}. "
                "Give dictionaries, lists, strings and numbers."
            ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (hasattr(value, "item") and np.ndim(value) == 0):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def absolute(path: epath.PathLike) -> epath.Path:
    """Makes a local path absolute, as Orbax requires; returns a bucket path unchanged."""
    folder = epath.Path(path)
    return folder if "://" in os.fspath(path) else folder.absolute()


def check_writable(directory: epath.Path) -> None:
    """Checks that a directory is writable by creating it and writing a temporary file.

    Raises:
      ValueError: the directory or the file cannot be created.
    """
    probe = directory / f".writable.{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"checkpoints cannot be written to {directory}: {error}. Set MODEL_DIR to a directory "
            "that this process may write to."
        ) from error


def begin(folder: epath.Path) -> None:
    """Creates a checkpoint folder that is marked as unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / UNFINISHED, "This checkpoint is not complete.\n")


def finish(folder: epath.Path, header_text: str) -> None:
    """Completes a checkpoint whose arrays have been written: writes the header and manifest."""
    write_durably(folder / HOST, header_text)
    write_manifest(folder, ignore=(UNFINISHED,))
    (folder / UNFINISHED).unlink(missing_ok=True)


def delete(folder: epath.Path) -> None:
    """Deletes a checkpoint. If this is interrupted, the rest of it is marked as unfinished."""
    (folder / UNFINISHED).write_text("This checkpoint is being deleted.\n")
    (folder / MANIFEST).unlink(missing_ok=True)
    # UNFINISHED is deleted last, because a folder that has arrays, but neither a manifest nor
    # UNFINISHED, counts as a damaged checkpoint.
    for child in list(folder.iterdir()):
        if child.is_dir():
            child.rmtree()
        elif child.name != UNFINISHED:
            child.unlink()
    folder.rmtree()


def is_unfinished(folder: epath.Path) -> bool:
    """Returns whether saving or deleting a checkpoint was interrupted.

    If this returns False for a folder without a manifest, the checkpoint is damaged.
    """
    if (folder / MANIFEST).exists():
        return False
    # A folder without files, or with hidden ones only, was left by a save that was interrupted
    # before it wrote UNFINISHED, or by a deletion that was interrupted after it removed UNFINISHED.
    return (folder / UNFINISHED).exists() or all(
        child.name.startswith(".") for child in folder.iterdir()
    )


def read_header(folder: epath.Path) -> Header:
    """Reads host.json.

    Raises:
      CorruptCheckpointError: the file is missing or damaged.
      ValueError: the checkpoint has another format version.
    """
    path = folder / HOST
    try:
        contents = json.loads(path.read_text())
        version = contents.pop("format_version")
        if version == FORMAT_VERSION:
            contents["shapes"] = {
                name: (tuple(shape), dtype) for name, (shape, dtype) in contents["shapes"].items()
            }
            return Header(**contents)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error!r}.") from error
    raise ValueError(
        f"{folder} has checkpoint format {version}, and this version of gkd_jax reads format "
        f"{FORMAT_VERSION}. Use the version of gkd_jax that wrote it, or another checkpoint."
    )


def to_nested(tree: PyTree[Any]) -> dict[str, Any]:
    """Converts a tree of arrays into nested dictionaries.

    Dataclasses, named tuples and other containers become dictionaries, whose keys are the names of
    their fields or the indices of their entries. The classes of the containers are not stored.

    Raises:
      ValueError: the tree holds a random key, which has no stable representation on disk.
    """
    nested: dict[str, Any] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = _names(path)
        if hasattr(array, "dtype") and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise ValueError(
                "a checkpoint's state must hold arrays; got a random key at "
                f"{'/'.join(_names(path))}. Store the seed in the host's part, or "
                "jax.random.key_data of the key."
            )
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = array if hasattr(array, "dtype") else np.asarray(array)
    return nested


def shapes_of(tree: PyTree[Any]) -> Shapes:
    """Returns the shape and dtype of each array (or `ShapeDtypeStruct`) of a tree, by name."""
    return {
        "/".join(_names(path)): (tuple(np.shape(array)), str(_dtype(array)))
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    }


class OtherShapesError(ValueError):
    """The arrays of a checkpoint differ from the requested ones."""


def check_shapes(
    stored: Shapes, wanted: Shapes, *, folder: epath.Path, dtypes: bool = False, limit: int = 3
) -> None:
    """Checks that the arrays of a checkpoint have the requested names and shapes.

    Args:
      stored: arrays of the checkpoint.
      wanted: arrays to restore.
      folder: the checkpoint, for error messages.
      dtypes: whether dtypes must also be equal.
      limit: maximum number of differences in the error message.

    Raises:
      OtherShapesError: names, shapes or dtypes differ. The message names the first few arrays that
        differ, with the stored and the requested shape.
    """

    def text(entry: tuple[tuple[int, ...], str]) -> str:
        return f"{entry[1]}{list(entry[0])}" if dtypes else str(list(entry[0]))

    problems = []
    for name in wanted:
        if name in stored and text(stored[name]) != text(wanted[name]):
            problems.append(f"{name} is {text(stored[name])}, wanted {text(wanted[name])}")
    problems += [f"{name} {text(wanted[name])} is missing" for name in wanted if name not in stored]
    problems += [
        f"{name} {text(stored[name])} is not wanted" for name in stored if name not in wanted
    ]
    forms = stacking.are_stacked(stored), stacking.are_stacked(wanted)
    if problems and forms[0] != forms[1]:
        raise OtherShapesError(
            f"the checkpoint {folder} does not fit: its layers are "
            f"{'stacked' if forms[0] else 'one by one'}, and those wanted are not. Set scan_layers "
            f"(SCAN_LAYERS) to {forms[0]}: a run goes on in its own form. Another run can start "
            "from it in either."
        )
    if problems:
        more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
        raise OtherShapesError(
            f"the checkpoint {folder} does not fit: {'; '.join(problems[:limit])}{more}. Set the "
            "model (optimizer, teacher) to those that it was written with, or choose another "
            "checkpoint."
        )


def read_arrays(folder: epath.Path, nested_abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays and converts them to the requested dtypes and shardings.

    Args:
      folder: a verified checkpoint whose shapes have been checked.
      nested_abstract: `ShapeDtypeStruct` of each array to read, in nested dictionaries like those
        that `to_nested` returns. Other arrays of the checkpoint are not read. An array without
        sharding is placed on the first local device.
    """

    def restore_args(array: Any) -> ocp.ArrayRestoreArgs:
        sharding = getattr(array, "sharding", None)
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=array.dtype, sharding=sharding, global_shape=array.shape
        )

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            folder / ARRAYS,
            args=ocp.args.PyTreeRestore(
                item=nested_abstract,
                restore_args=jax.tree.map(restore_args, nested_abstract),
                partial_restore=True,
            ),
        )


def from_nested(nested: Mapping[str, Any], like: PyTree[Any]) -> PyTree[Any]:
    """Returns the arrays of nested dictionaries in the containers of `like`.

    This is the inverse of `to_nested`.
    """

    def find(path: Any, _: Any) -> Any:
        node: Any = nested
        for name in _names(path):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(find, like)


def _dtype(array: Any) -> np.dtype:
    return array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype


def _names(path: Any) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def write_evaluated(directory: epath.Path, step: int, scores: Mapping[str, float]) -> None:
    """Writes the evaluation scores of a step whose checkpoint was saved before the evaluation.

    The scores go into a file next to the checkpoint. The checkpoint itself is not modified.
    """
    path = directory / f"evaluated_{step}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(dict(scores)))
    unfinished.replace(path)


def read_evaluated(directory: epath.Path, step: int) -> dict[str, float] | None:
    """Returns the scores that `write_evaluated` wrote; None if there are none."""
    path = directory / f"evaluated_{step}.json"
    return json.loads(path.read_text()) if path.exists() else None
