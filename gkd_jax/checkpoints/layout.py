"""One checkpoint's folder: its files, its description, and reading arrays from it.

checkpoint_1000/
  arrays/         every array of the tree, by Orbax, whatever the mesh
  host.json       format version, kind, step, names and shapes of arrays, and the host's part
  MANIFEST.json   digests of both, written last
  UNFINISHED      there only while the checkpoint is being written or deleted
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
"""Name of an array, such as 'params/decoder/norm/scale', to shape and dtype."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What host.json holds.

    Attributes:
      kind: 'state' (a training state) or 'params' (parameters only).
      step: number of updates made; None for exported parameters.
      shapes: every array of the tree.
      metric: the value by which the best checkpoint is kept, if it was measured.
      host: the caller's own part.
    """

    kind: str
    step: int | None
    shapes: Shapes
    metric: float | None
    host: dict[str, Any]

    def dump(self) -> str:
        """Turns it into JSON.

        Raises:
          ValueError: the host's part is not JSON.
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
    """Makes a local path absolute, as Orbax wants it; a bucket's is already."""
    folder = epath.Path(path)
    return folder if "://" in os.fspath(path) else folder.absolute()


def check_writable(directory: epath.Path) -> None:
    """Makes a directory and writes a file in it, on trial.

    Raises:
      ValueError: that cannot be done.
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
    """Makes the folder, marked as unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / UNFINISHED, "This checkpoint is not complete.\n")


def finish(folder: epath.Path, header_text: str) -> None:
    """Completes a folder whose arrays were committed."""
    write_durably(folder / HOST, header_text)
    write_manifest(folder, ignore=(UNFINISHED,))
    (folder / UNFINISHED).unlink(missing_ok=True)


def delete(folder: epath.Path) -> None:
    """Deletes a checkpoint; if that is cut off, it is left marked as unfinished."""
    (folder / UNFINISHED).write_text("This checkpoint is being deleted.\n")
    (folder / MANIFEST).unlink(missing_ok=True)
    # The mark goes last: what had lost it but not its arrays would pass for a damaged checkpoint.
    for child in list(folder.iterdir()):
        if child.is_dir():
            child.rmtree()
        elif child.name != UNFINISHED:
            child.unlink()
    folder.rmtree()


def is_unfinished(folder: epath.Path) -> bool:
    """Whether it was left while it was saved or deleted, rather than damaged afterwards."""
    if (folder / MANIFEST).exists():
        return False
    # Nothing but hidden files: it was left before its mark was written, or after that was deleted.
    return (folder / UNFINISHED).exists() or all(
        child.name.startswith(".") for child in folder.iterdir()
    )


def read_header(folder: epath.Path) -> Header:
    """Reads host.json.

    Raises:
      CorruptCheckpointError: it is missing or damaged.
      ValueError: it was written by another version of the format.
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
    """Turns any tree into dictionaries whose keys are names.

    Classes of containers (dataclasses, named tuples) are no part of what is stored.

    Raises:
      ValueError: a leaf is a random key, which has no stable form on disk.
    """
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = _names(path)
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                "a checkpoint's state must hold arrays; got a random key at "
                f"{'/'.join(_names(path))}. Store the seed in the host's part, or "
                "jax.random.key_data of the key."
            )
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return nested


def shapes_of(tree: PyTree[Any]) -> Shapes:
    """Names, shapes and dtypes of a tree's arrays (or of their `ShapeDtypeStruct`s)."""
    return {
        "/".join(_names(path)): (tuple(np.shape(leaf)), str(_dtype(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


class OtherShapesError(ValueError):
    """A checkpoint has other arrays than are wanted."""


def check_shapes(
    stored: Shapes, wanted: Shapes, *, folder: epath.Path, dtypes: bool = False, limit: int = 3
) -> None:
    """Compares what a checkpoint holds with what is wanted.

    Args:
      stored: what the checkpoint holds.
      wanted: what is to be restored.
      folder: named in messages.
      dtypes: whether dtypes must agree too.
      limit: how many differences are named.

    Raises:
      OtherShapesError: naming the first few arrays that differ, with both shapes.
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
    """Reads arrays onto the shardings and into the dtypes of `ShapeDtypeStruct`s.

    Args:
      folder: a checkpoint that was verified and whose shapes were checked.
      nested_abstract: what to read, a part of the tree: dictionaries as of `to_nested`. A leaf
        without sharding comes to this process's first device.
    """

    def restore_args(leaf: Any) -> ocp.ArrayRestoreArgs:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=leaf.dtype, sharding=sharding, global_shape=leaf.shape
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
    """Puts the leaves of `to_nested(like)`'s structure back into the containers of `like`."""

    def find(path: Any, _: Any) -> Any:
        node: Any = nested
        for name in _names(path):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(find, like)


def _dtype(leaf: Any) -> np.dtype:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _names(path: Any) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def write_evaluated(directory: epath.Path, step: int, scores: Mapping[str, float]) -> None:
    """Notes the scores of an evaluation that a checkpoint owed: that stays as it was written."""
    path = directory / f"evaluated_{step}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(dict(scores)))
    unfinished.replace(path)


def read_evaluated(directory: epath.Path, step: int) -> dict[str, float] | None:
    """What `write_evaluated` noted; None if it did not."""
    path = directory / f"evaluated_{step}.json"
    return json.loads(path.read_text()) if path.exists() else None
