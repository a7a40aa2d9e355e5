"""Files that data are appended to, and checks of folders; both on disk or in a bucket.

Objects in a bucket cannot be appended to, so a growing file in a bucket is uploaded again as a
whole.
"""

import importlib.util
import os
import time
import uuid
from typing import IO, Any

from absl import logging
from etils import epath

from gkd_jax.common.moved import load_moved

# Data appended since the last upload are lost if the process dies. The longer an upload takes, the
# longer is the pause after it, so that uploads take at most a tenth of the time.
_SECONDS_BETWEEN_UPLOADS = 30.0
_MAX_SHARE_OF_TIME = 0.1


class GrowingFile:
    """A file that data are appended to.

    On disk each `append` is written at once. In a bucket (`gs://...`) the file is kept in memory
    and uploaded as a whole: at most every 30 seconds, at `sync` and at `close`.
    """

    def __init__(self, path: epath.PathLike, content: bytes | None = None):
        """Opens a file and creates its folder.

        Args:
          path: a local path, or one in a bucket.
          content: new content that replaces an existing file; None keeps the existing content. The
            replacement is atomic: a crash leaves either the old or the new content.
        """
        self._path = epath.Path(path)
        self._local: IO[Any] | None = None
        self._content = bytearray()
        self._is_uploaded = True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not is_in_bucket(path):
            if content is not None:
                unfinished = self._path.with_suffix(".unfinished")
                unfinished.write_bytes(content)
                unfinished.replace(self._path)
            self._local = self._path.open("ab")
            return
        if content is not None:
            self._path.write_bytes(content)
        elif self._path.exists():
            content = self._path.read_bytes()
        self._content += content or b""
        self._due_time = time.monotonic() + _SECONDS_BETWEEN_UPLOADS

    def append(self, data: bytes) -> None:
        """Appends data to the file."""
        if self._local is not None:
            self._local.write(data)
            self._local.flush()
            return
        self._content += data
        self._is_uploaded = False
        if time.monotonic() >= self._due_time:
            try:
                self.sync()
            except RuntimeError as error:
                # A failed upload is not a reason to end the run.
                logging.warning("%s It is tried again with what comes.", error)

    def sync(self) -> None:
        """Uploads appended data.

        Raises:
          RuntimeError: the upload failed.
        """
        if self._local is not None or self._is_uploaded:
            return
        start = time.monotonic()
        try:
            self._path.write_bytes(bytes(self._content))
        except Exception as error:  # Each bucket library has its own exceptions.
            raise RuntimeError(
                f"{self._path} could not be written ({error!r}). Is the bucket still there, and "
                "may you write to it?"
            ) from error
        finally:
            end = time.monotonic()
            pause = max(_SECONDS_BETWEEN_UPLOADS, (end - start) / _MAX_SHARE_OF_TIME)
            self._due_time = end + pause
        self._is_uploaded = True

    def close(self) -> None:
        """Uploads appended data and closes the file."""
        self.sync()
        if self._local is not None:
            self._local.close()


def prefer_gcsfs() -> None:
    """Makes etils access buckets through gcsfs instead of TensorFlow, if gcsfs is installed.

    TensorFlow's files do not support `seek` during writing. TensorFlow also raises its own types of
    exceptions instead of Python's.
    """
    if importlib.util.find_spec("gcsfs") is not None:
        os.environ.setdefault("EPATH_USE_TF", "false")


def children(folder: epath.Path) -> list[epath.Path]:
    """Lists a folder; returns an empty list if it does not exist.

    Other storage errors are raised. This function does not use `is_dir`, which returns False for
    any error of a bucket: a run would then start from scratch instead of resuming.
    """
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except Exception as error:
        # TensorFlow's exception for a missing folder, which etils does not convert.
        if type(error).__name__ == "NotFoundError":
            return []
        raise


def is_in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket, such as `gs://bucket/run`."""
    return "://" in os.fspath(path)


def check_writable(setting: str, folder: epath.Path, *, remedy: str) -> None:
    """Checks that a folder can be written, by writing and removing a small file.

    If the folder does not exist, its nearest existing parent is checked.

    Args:
      setting: name of the setting that contains the folder, for error messages.
      folder: a local folder, or one in a bucket.
      remedy: first words of the remedy in error messages, which continue with "a folder that ...".

    Raises:
      ValueError: the folder cannot be written.
    """
    if is_in_bucket(folder):
        existing, remedy = folder, f"Is that the bucket's name, and may you write there? {remedy}"
    else:
        existing = folder
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    probe = existing / f".write_check_{uuid.uuid4().hex}"
    try:
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # Each bucket library has its own exceptions.
        reason = error.strerror if isinstance(error, OSError) else None
        raise ValueError(
            f"{setting} cannot be written: {folder} ({existing}: {reason or error}). "
            f"{remedy} a folder that this user may write to."
        ) from error


def __getattr__(name: str) -> Any:
    """Returns a name that this module defined in earlier versions."""
    return load_moved(__name__, name)
