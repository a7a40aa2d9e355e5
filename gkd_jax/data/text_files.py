"""Random access to the lines of text files: plain or gzip, local or in a bucket.

A file is scanned once to index its lines, to compute a digest of its content and to check that it
is UTF-8. Lines of a plain local file are then read from disk on request; only the index is kept in
memory, with 8 bytes per line. Compressed and remote files are kept in memory as a whole.
"""

import bisect
import codecs
import gzip
import hashlib
import io
import os
import weakref
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np

_BLOCK_BYTES = 1 << 22
_EPATH_SCHEMES = ("gs", "s3", "az", "hf")


def as_paths(path: str | os.PathLike[str] | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Returns one path or several as a tuple of str."""
    if isinstance(path, (str, os.PathLike)):
        return (os.fspath(path),)
    return tuple(os.fspath(one) for one in path)


def open_bytes(path: str, *, setting: str) -> IO[bytes]:
    """Opens a file for reading, and decompresses it if its name ends in '.gz'.

    Args:
      path: a local path, or a URL ('gs://bucket/file'), which is opened by etils or fsspec.
      setting: name of the setting that contains the path, for error messages.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the path is a folder, or the package for this kind of URL is not installed.
    """
    try:
        file = _open_raw(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{setting} names a file that does not exist: {path!r}. Correct the path; a relative "
            f"one starts at the working directory {os.getcwd()!r}."
        ) from error
    except (IsADirectoryError, PermissionError, ImportError, ValueError) as error:
        raise ValueError(
            f"{setting} names {path!r}, which cannot be read: {error}. Name a readable file."
        ) from error
    return io.BufferedReader(gzip.GzipFile(fileobj=file)) if path.endswith(".gz") else file


def _open_raw(path: str) -> IO[bytes]:
    scheme, separator, _ = path.partition("://")
    if not separator:
        return open(path, "rb")
    if scheme in _EPATH_SCHEMES:
        from etils import epath

        # Read as a whole, since files in buckets do not always support the operations that
        # decompression needs.
        return io.BytesIO(epath.Path(path).read_bytes())
    import fsspec

    return fsspec.open(path, "rb").open()


def blocks(path: str, *, setting: str) -> Iterator[bytes]:
    """Yields the content of a file in blocks.

    Args:
      path: a local path, or a URL.
      setting: name of the setting with the path, for messages.

    Raises:
      ValueError: the file is a broken gzip file.
    """
    with open_bytes(path, setting=setting) as file:
        try:
            while block := file.read(_BLOCK_BYTES):
                yield block
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{setting} names {path!r}, which is not a complete gzip file: {error}. Copy it "
                "again, or drop '.gz' from its name if it is not compressed."
            ) from error


class TextFile:
    """The lines of one file, including blank lines, without line endings (LF or CR LF).

    Args:
      path: a local path, or a URL.
      setting: name of the setting with the path, for messages.

    Attributes:
      path: the path.
      digest: digest of the (decompressed) content.
    """

    def __init__(self, path: str, *, setting: str):
        self.path = path
        self._setting = setting
        kept: list[bytes] | None = [] if path.endswith(".gz") or "://" in path else None
        digest = hashlib.sha256()
        decoder = codecs.getincrementaldecoder("utf-8")()
        ends: list[np.ndarray] = []
        size = lines = 0
        first = last = b""
        for block in blocks(path, setting=setting):
            self._check_text(decoder, block, lines_before=lines)
            digest.update(block)
            newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            ends.append(newlines + size)
            size, lines = size + len(block), lines + len(newlines)
            first, last = first or block[:3], block[-1:]
            if kept is not None:
                kept.append(block)
        self._check_text(decoder, b"", lines_before=lines, final=True)
        if last not in (b"", b"\n"):
            ends.append(np.array([size]))
        self._ends = np.concatenate(ends, dtype=np.int64) if ends else np.zeros(0, np.int64)
        self._first_start = len(codecs.BOM_UTF8) if first == codecs.BOM_UTF8 else 0
        self.digest = digest.hexdigest()
        self._content = None if kept is None else b"".join(kept)
        if kept is None:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    def _check_text(
        self,
        decoder: codecs.IncrementalDecoder,
        block: bytes,
        *,
        lines_before: int,
        final: bool = False,
    ) -> None:
        try:
            decoder.decode(block, final=final)
        except UnicodeDecodeError as error:
            # The error's offset also counts bytes that the decoder kept from the previous block.
            start = max(0, error.start - (len(error.object) - len(block)))
            line = lines_before + block.count(b"\n", 0, start) + 1
            raise ValueError(
                f"{self._setting} names {self.path!r}, line {line} of which is not UTF-8 text "
                f"({error.reason}). Convert the file, e.g. with `iconv -f latin1 -t utf-8`."
            ) from error

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) + 1 if index else self._first_start
        length = int(self._ends[index]) - start
        if self._content is not None:
            line = self._content[start : start + length]
        else:
            # Positioned reads need no lock between threads. If the file was truncated after it was
            # indexed, a read returns too few bytes, which can be reported. Access to a memory map
            # of a truncated file would crash the process.
            line = os.pread(self._descriptor, length, start)
            if len(line) != length:
                raise ValueError(
                    f"{self._setting} names {self.path!r}, which became shorter while it was "
                    "read. Leave data files alone during a run."
                )
        return line.removesuffix(b"\r").decode("utf-8")


class TextLines:
    """The lines of several files as one sequence.

    Args:
      paths: the files, in order.
      setting: name of the setting with the paths, for messages.

    Raises:
      ValueError: `paths` is empty, all files are empty, or a file is not UTF-8 text.
    """

    def __init__(self, paths: tuple[str, ...], *, setting: str):
        if not paths:
            raise ValueError(f"{setting} names no file. Give at least one path.")
        self._files = [TextFile(path, setting=setting) for path in paths]
        self._stops = np.cumsum([len(file) for file in self._files]).tolist()
        if not len(self):
            raise ValueError(
                f"{setting} names an empty file: {', '.join(map(repr, paths))}. Give a file with "
                "one example a line."
            )

    def __len__(self) -> int:
        return self._stops[-1]

    def _file_and_line(self, index: int) -> tuple[TextFile, int]:
        number = bisect.bisect_right(self._stops, index)
        return self._files[number], index - (self._stops[number - 1] if number else 0)

    def __getitem__(self, index: int) -> str:
        file, line = self._file_and_line(index)
        return file[line]

    def where(self, index: int) -> str:
        """Returns the file and the line number (from 1) of a line, for messages."""
        file, line = self._file_and_line(index)
        return f"{file.path!r}, line {line + 1}"

    @property
    def first_lines(self) -> tuple[int, ...]:
        """Index of the first line of each file that has lines."""
        starts = [0, *self._stops[:-1]]
        return tuple(start for start, stop in zip(starts, self._stops, strict=True) if start < stop)

    def counts(self) -> str:
        """Returns the number of lines of each file, for messages."""
        return " + ".join(f"{len(file)} in {file.path!r}" for file in self._files)

    @property
    def digest(self) -> str:
        """Digest of the (decompressed) content of all files in order."""
        return hashlib.sha256(" ".join(file.digest for file in self._files).encode()).hexdigest()
