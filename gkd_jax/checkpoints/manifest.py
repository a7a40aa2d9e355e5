"""Manifests: digests of all files of a checkpoint, written last and verified before a restore.

An array file in which a bit has flipped is read without an error, and a folder left by a killed
process may look complete. A checkpoint therefore counts as complete only if it has a manifest. The
manifest lists the size and SHA-256 digest of each file, and ends with a digest of this list.
"""

import concurrent.futures
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

MANIFEST = "MANIFEST.json"

_CHUNK_BYTES = 1 << 20
_NUM_THREADS = 8  # hashlib releases the GIL, so digests are computed in parallel.


class CorruptCheckpointError(ValueError):
    """Files of a checkpoint are missing or have changed since they were written."""


def write_manifest(folder: epath.Path, *, ignore: tuple[str, ...] = ()) -> None:
    """Flushes the files of a checkpoint to disk and writes their manifest atomically.

    Args:
      folder: a checkpoint whose files are all closed.
      ignore: names of files in `folder` that are not part of the checkpoint.
    """
    names = sorted(_files(folder, ignore=(MANIFEST, *ignore)))
    for name in names:
        _sync(folder / name)
    for name in {os.path.dirname(name) for name in names} - {""}:
        _sync(folder / name)
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        digests = pool.map(lambda name: _digest(folder / name), names)
        files = {
            name: {"bytes": _size(folder / name), "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }
    write_durably(folder / MANIFEST, _dump(files))
    _sync(folder.parent)


def verify_manifest(folder: epath.Path, *, digests: bool = True) -> None:
    """Checks a checkpoint against its manifest.

    Args:
      folder: a checkpoint.
      digests: if False, compares only sizes, which is fast but does not detect changed bits.

    Raises:
      CorruptCheckpointError: a file is missing or has changed; the message names the first one.
    """
    files = _load(folder)
    for name, entry in files.items():
        path = folder / name
        size = _size(path) if path.exists() else None
        if size is None:
            raise CorruptCheckpointError(f"{path} is missing, but {MANIFEST} lists it.")
        if size != entry["bytes"]:
            raise CorruptCheckpointError(
                f"{path} has {size} bytes, but {MANIFEST} says {entry['bytes']}."
            )
    if not digests:
        return
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = pool.map(lambda name: _digest(folder / name), files)
        for (name, entry), digest in zip(files.items(), found, strict=True):
            if digest != entry["sha256"]:
                raise CorruptCheckpointError(
                    f"{folder / name} is not what was written: its SHA-256 digest is "
                    f"{digest[:12]}..., but {MANIFEST} says {entry['sha256'][:12]}...."
                )


def write_durably(path: epath.Path, text: str) -> None:
    """Writes a file atomically: after a crash it is either complete or absent."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _load(folder: epath.Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        text = path.read_text()
        files = json.loads(text)["files"]
        # The text is compared byte by byte, so that any change of the manifest itself is detected.
        intact = _dump(files) == text
    except FileNotFoundError as error:
        raise CorruptCheckpointError(
            f"{path} is missing: the checkpoint was not completely written or copied."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error!r}.") from error
    if not intact:
        raise CorruptCheckpointError(f"{path} is not what was written: its own digest differs.")
    return files


def _dump(files: dict[str, Any]) -> str:
    body = json.dumps(files, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _files(folder: epath.Path, *, ignore: tuple[str, ...], prefix: str = "") -> Iterator[str]:
    for child in folder.iterdir():
        if child.is_dir():
            yield from _files(child, ignore=(), prefix=f"{prefix}{child.name}/")
        elif child.name not in ignore:
            yield prefix + child.name


def _digest(path: epath.Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _size(path: epath.Path) -> int:
    return int(path.stat().length)


def _sync(path: epath.Path) -> None:
    """Flushes a local file or folder to disk. Does nothing in a bucket, where files are durable."""
    name = os.fspath(path)
    if "://" in name:
        return
    descriptor = os.open(name, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
