"""Files that grow: appended to on a disk; in a bucket, whose objects cannot, written anew."""

import importlib.util
import os
import time
import uuid
from typing import IO, Any

from absl import logging
from etils import epath

# What is written between is lost with the process. Large files are uploaded less often, in a tenth
# of the time.
_SECONDS_BETWEEN_UPLOADS = 30.0
_MOST_OF_THE_TIME = 0.1


class AppendedFile:
    """A file that grows.

    On a disk each `append` is written at once. In a bucket (`gs://...`) the file is held in memory
    and uploaded whole: every half minute at most, at `sync` and at `close`.
    """

    def __init__(self, path: epath.PathLike, content: bytes | None = None):
        """Opens a file, making its folder.

        Args:
          path: local, or in a bucket.
          content: what the file holds from now on; None keeps what is there. It takes the place of
            that whole: a crash leaves one or the other.
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
        """Adds to the end."""
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
                # The run need not end for it.
                logging.warning("%s It is tried again with what comes.", error)

    def sync(self) -> None:
        """Uploads what is held.

        Raises:
          RuntimeError: the bucket did not take it.
        """
        if self._local is not None or self._is_uploaded:
            return
        start = time.monotonic()
        try:
            self._path.write_bytes(bytes(self._content))
        except Exception as error:  # Each library that reaches buckets has its own.
            raise RuntimeError(
                f"{self._path} could not be written ({error!r}). Is the bucket still there, and "
                "may you write to it?"
            ) from error
        finally:
            end = time.monotonic()
            pause = max(_SECONDS_BETWEEN_UPLOADS, (end - start) / _MOST_OF_THE_TIME)
            self._due_time = end + pause
        self._is_uploaded = True

    def close(self) -> None:
        """Uploads what is held, and closes."""
        self.sync()
        if self._local is not None:
            self._local.close()


def prefer_gcsfs() -> None:
    """Has etils reach buckets by gcsfs where that is installed, rather than by TensorFlow.

    TensorFlow's files cannot be sought in while they are written, and its errors are its own.
    """
    if importlib.util.find_spec("gcsfs") is not None:
        os.environ.setdefault("EPATH_USE_TF", "false")


def children(folder: epath.Path) -> list[epath.Path]:
    """What is in a folder, nothing where there is none; raises where that cannot be known.

    Of a bucket `is_dir` says False whatever goes wrong, and a run would begin anew.
    """
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except Exception as error:
        if type(error).__name__ == "NotFoundError":  # TensorFlow's, which etils hands on.
            return []
        raise


def is_in_bucket(path: epath.PathLike) -> bool:
    """Whether a path names a bucket's object, such as `gs://bucket/run`."""
    return "://" in os.fspath(path)


def check_writable(setting: str, folder: epath.Path, *, remedy: str) -> None:
    """Writes a file on trial into a folder, or into what there is of its path; leaves nothing.

    Args:
      setting: what names the folder, for messages.
      folder: local, or in a bucket.
      remedy: how to name another, which a message goes on from with "a folder ...".

    Raises:
      ValueError: it cannot be written.
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
    except Exception as error:  # Each library that reaches buckets has its own.
        told = error.strerror if isinstance(error, OSError) else None
        raise ValueError(
            f"{setting} cannot be written: {folder} ({existing}: {told or error}). "
            f"{remedy} a folder that this user may write to."
        ) from error
