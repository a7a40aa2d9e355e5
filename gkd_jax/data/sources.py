"""Sources of raw examples: local or remote files, TFDS data sets, and examples in memory.

Each public class is a frozen dataclass that only names the data. The method `open` checks all of
the data, so that an error in a file is reported before training, with the number of its line.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gkd_jax.data.task import RawExample, Source
from gkd_jax.data.text_files import TextLines, as_paths

Path = str | os.PathLike[str]


class _LineSource:
    """A source that makes each example from its index, such as the number of a line."""

    def __init__(
        self,
        fingerprint: str,
        make: Callable[[int], RawExample],
        indices: Sequence[int] | np.ndarray,
    ):
        self.fingerprint = fingerprint
        self._make = make
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> RawExample:
        return self._make(int(self._indices[index]))


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=repr, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_fields(
    example: Mapping[str, Any], fields: tuple[str, ...], *, setting: str, where: str
) -> None:
    for field in fields:
        if field not in example:
            raise ValueError(
                f"{setting} wants the field {field!r}, which {where} lacks: it has "
                f"{', '.join(map(repr, example)) or 'none'}. Name one of these or correct the file."
            )


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """Examples from files with one JSON object per line; blank lines are skipped.

    Attributes:
      path: one file or several, plain or '.gz', a local path or a URL ('gs://...').
      fields: fields that every object must have; they are checked when the file is opened.
    """

    path: Path | tuple[str, ...]
    fields: tuple[str, ...] = ()

    def open(self) -> Source:
        """Reads and checks every line.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: there is no example, or a line is not a JSON object or lacks a field; the
            message names the line.
        """
        lines = TextLines(as_paths(self.path), setting="JsonLines.path")
        indices = [index for index in range(len(lines)) if self._check(lines, index)]
        if not indices:
            raise ValueError(
                f"JsonLines.path names an empty data set: {self.path!r} has only blank lines. "
                "Give a file with one JSON object a line."
            )
        make = functools.partial(_parse_json, lines)
        return _LineSource(_digest("json", lines.digest), make, np.asarray(indices, np.int64))

    def _check(self, lines: TextLines, index: int) -> bool:
        if not lines[index].strip():
            return False
        example = _parse_json(lines, index)
        if self.fields:
            where = lines.where(index)
            _require_fields(example, tuple(self.fields), setting="JsonLines.fields", where=where)
        return True


def _parse_json(lines: TextLines, index: int) -> RawExample:
    try:
        example = json.loads(lines[index])
    except json.JSONDecodeError as error:
        raise ValueError(
            f"JsonLines.path has a broken JSON line: {lines.where(index)}, column {error.colno}: "
            f"{error.msg}. Correct or remove this line."
        ) from error
    if not isinstance(example, dict):
        raise ValueError(
            f"JsonLines.path wants one JSON object a line; {lines.where(index)} holds a "
            f"{type(example).__name__}. Correct or remove this line."
        )
    return example


@dataclasses.dataclass(frozen=True)
class Tsv:
    r"""Examples from files with one example per line, in tab-separated columns.

    Blank lines are skipped. Quotes are ordinary characters, and nothing is unescaped. FLAN's files
    write a newline as `\n`: use `Templated.unescape_newlines` for them.

    Attributes:
      path: one file or several, plain or '.gz', a local path or a URL.
      columns: names of the columns in order; None reads them from the first line of each file.
      fields: columns that must exist.
    """

    path: Path | tuple[str, ...]
    columns: tuple[str, ...] | None = None
    fields: tuple[str, ...] = ()

    def open(self) -> Source:
        """Reads and checks every line.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: there is no example, a column is missing, or a line has a different number of
            columns.
        """
        lines = TextLines(as_paths(self.path), setting="Tsv.path")
        columns = self.columns and tuple(self.columns)
        headers: tuple[int, ...] = ()
        if not columns:
            headers = lines.first_lines
            columns = tuple(lines[headers[0]].split("\t"))
            self._check_headers(lines, headers, columns)
        _require_fields(
            dict.fromkeys(columns), tuple(self.fields), setting="Tsv.fields", where=repr(self.path)
        )
        indices = [
            index
            for index in range(len(lines))
            if index not in headers and self._check(lines, index, columns)
        ]
        if not indices:
            raise ValueError(
                f"Tsv.path names an empty data set: {self.path!r} has no line of data. Give a "
                "file with one example a line; without a header, set Tsv.columns."
            )

        def make(index: int) -> RawExample:
            return dict(zip(columns, lines[index].split("\t"), strict=True))

        fingerprint = _digest("tsv", lines.digest, columns)
        return _LineSource(fingerprint, make, np.asarray(indices, np.int64))

    def _check_headers(
        self, lines: TextLines, headers: tuple[int, ...], columns: tuple[str, ...]
    ) -> None:
        for header in headers[1:]:
            if tuple(lines[header].split("\t")) != columns:
                raise ValueError(
                    f"Tsv.path names files with different headers: {lines.where(header)} is not "
                    f"{', '.join(columns)!r}. Set Tsv.columns if the files have no header."
                )

    def _check(self, lines: TextLines, index: int, columns: tuple[str, ...]) -> bool:
        line = lines[index]
        if not line.strip():
            return False
        count = line.count("\t") + 1
        if count != len(columns):
            raise ValueError(
                f"Tsv.path: {lines.where(index)} has {count} columns where {len(columns)} are "
                f"wanted ({', '.join(columns)}). Correct the line, or set Tsv.columns."
            )
        return True


@dataclasses.dataclass(frozen=True)
class ParallelText:
    """Pairs of lines of two files, or of two sequences of files.

    Line i of the prompts corresponds to line i of the outputs. Examples have the fields 'inputs'
    and 'targets'. Blank lines are kept, since dropping one would shift all following lines.

    Attributes:
      inputs_path: one file or several with the prompts.
      targets_path: one file or several with the outputs.
    """

    inputs_path: Path | tuple[str, ...]
    targets_path: Path | tuple[str, ...]

    def open(self) -> Source:
        """Counts the lines of both sides.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a side is empty, or the numbers of lines differ.
        """
        inputs = TextLines(as_paths(self.inputs_path), setting="ParallelText.inputs_path")
        targets = TextLines(as_paths(self.targets_path), setting="ParallelText.targets_path")
        if len(inputs) != len(targets):
            raise ValueError(
                "ParallelText wants as many lines in inputs_path as in targets_path; got "
                f"{len(inputs)} ({inputs.counts()}) and {len(targets)} ({targets.counts()}). "
                "Take both sides from the same release, and check that no line was lost."
            )

        def make(index: int) -> RawExample:
            return {"inputs": inputs[index], "targets": targets[index]}

        fingerprint = _digest("parallel", inputs.digest, targets.digest)
        return _LineSource(fingerprint, make, range(len(inputs)))


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Examples given in Python.

    Attributes:
      examples: raw examples, at least one.
    """

    examples: Sequence[Mapping[str, Any]]

    def open(self) -> Source:
        """Copies the examples.

        Raises:
          ValueError: there are no examples.
        """
        if not self.examples:
            raise ValueError("InMemory.examples is empty. Give at least one example.")
        examples = tuple(dict(example) for example in self.examples)
        return _LineSource(_digest("memory", examples), examples.__getitem__, range(len(examples)))


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A data set of TensorFlow Datasets, read by `tfds.data_source` without a TensorFlow graph.

    Attributes:
      name: name in TFDS, with configuration and version ('wmt14_translate/de-en:1.0.0').
      split: split in TFDS, which may be a slice ('train', 'validation[:500]').
      data_dir: folder or bucket of prepared data; None uses TFDS's default
        (`~/tensorflow_datasets`). Missing data are downloaded and prepared in a format with random
        access.
    """

    name: str
    split: str
    data_dir: str | None = None

    def open(self) -> Source:
        """Opens the data set. If it is not prepared yet, it is downloaded and prepared first.

        Raises:
          ValueError: TFDS is not installed, the data set or split does not exist, or the data were
            prepared in a format without random access.
        """
        setting = (
            f"TfdsSource(name={self.name!r}, split={self.split!r}, data_dir={self.data_dir!r})"
        )
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                f"{setting} needs TensorFlow Datasets, which cannot be imported ({error}). "
                "Install it with: pip install 'gkd_jax[data]'"
            ) from error
        try:
            data = tfds.data_source(self.name, split=self.split, data_dir=self.data_dir)
            info = tfds.builder(self.name, data_dir=self.data_dir).info
            shards = {name: split.shard_lengths for name, split in info.splits.items()}
        except NotImplementedError as error:
            raise ValueError(
                f"{setting} is prepared in a format without random access. Set data_dir to an "
                "empty folder, or prepare it with `tfds build --file_format=array_record`. "
                f"TFDS says: {error}"
            ) from error
        except Exception as error:  # TFDS raises exceptions of many types.
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
            raise ValueError(
                f"{setting} cannot be opened: {reason} Check the name, the split and data_dir; "
                "without a network, data_dir must hold the prepared data."
            ) from error
        if not len(data):
            raise ValueError(f"{setting} is an empty data set. Name another split.")
        size = len(data)
        sample = [_to_text(data[index]) for index in (0, size // 2, size - 1)]
        fingerprint = _digest(
            "tfds", info.full_name, self.split, size, shards, info.dataset_size, sample
        )
        return _LineSource(fingerprint, lambda index: _to_text(data[index]), range(size))


def _to_text(value: Any) -> Any:
    """Converts values read from TFDS (bytes, NumPy arrays) to str, lists and Python numbers."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _to_text(element) for key, element in value.items()}
    if isinstance(value, np.ndarray):
        return _to_text(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_to_text(element) for element in value]
    return value
