"""Files of tokenized examples, with random access. They are written atomically."""

import array
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable

import numpy as np

from gkd_jax.data.task import RawExample, TextExample

_FORMAT = 1


def write_token_files(
    folder: pathlib.Path, examples: Iterable[TextExample], *, description: str
) -> None:
    """Writes examples to a temporary folder, which is renamed when it is complete.

    If several processes write the same folder, the files of the first process to finish are kept.
    The files of the other processes have the same content and are removed.

    Args:
      folder: folder to create; its parent is created if it does not exist.
      examples: examples with `inputs_ids` and `targets_ids`.
      description: description of the content, stored in `meta.json`.

    Raises:
      ValueError: there are no examples.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        meta = _write(scratch, examples)
        meta["description"] = description
        (scratch / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(scratch: pathlib.Path, examples: Iterable[TextExample]) -> dict[str, object]:
    token_ends = array.array("q", [0])
    text_ends = array.array("q", [0])
    digest = hashlib.sha256()
    with open(scratch / "tokens.bin", "wb") as tokens, open(scratch / "texts.bin", "wb") as texts:
        for example in examples:
            for ids in (example.inputs_ids or (), example.targets_ids or ()):
                block = np.asarray(ids, "<i4").tobytes()
                tokens.write(block)
                digest.update(block)
                token_ends.append(token_ends[-1] + len(ids))
            record = [example.inputs, example.targets, list(example.references)]
            line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
            texts.write(line)
            digest.update(line)
            text_ends.append(text_ends[-1] + len(line))
        for file in (tokens, texts):
            file.flush()
            os.fsync(file.fileno())
    if len(text_ends) == 1:
        raise ValueError("the data set is empty")
    np.save(scratch / "token_ends.npy", np.asarray(token_ends, np.int64))
    np.save(scratch / "text_ends.npy", np.asarray(text_ends, np.int64))
    return {
        "format": _FORMAT,
        "num_examples": len(text_ends) - 1,
        "num_tokens": token_ends[-1],
        "text_bytes": text_ends[-1],
        "fingerprint": digest.hexdigest(),
    }


class TokenFiles:
    """A source that reads the files of `write_token_files`. Can be read from several threads.

    Args:
      folder: folder of the files.

    Raises:
      ValueError: the files have another format or are incomplete.
    """

    def __init__(self, folder: pathlib.Path):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = meta["fingerprint"]
        try:
            if meta["format"] != _FORMAT:
                raise ValueError(f"format {meta['format']} where {_FORMAT} is wanted")
            self._token_ends = np.load(folder / "token_ends.npy")
            self._text_ends = np.load(folder / "text_ends.npy")
            self._tokens = _map(folder / "tokens.bin", "<i4", meta["num_tokens"])
            self._texts = _map(folder / "texts.bin", "u1", meta["text_bytes"])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"The token files in {str(folder)!r} cannot be read: {error}. Remove this folder; "
                "it is made again from the seqio task."
            ) from error

    def __len__(self) -> int:
        return len(self._text_ends) - 1

    def __getitem__(self, index: int) -> RawExample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        start, middle, end = self._token_ends[2 * index : 2 * index + 3]
        text = self._texts[self._text_ends[index] : self._text_ends[index + 1]].tobytes()
        inputs, targets, references = json.loads(text.decode("utf-8", "surrogatepass"))
        return {
            "inputs": inputs,
            "targets": targets,
            "references": references,
            "inputs_ids": self._tokens[start:middle].tolist(),
            "targets_ids": self._tokens[middle:end].tolist(),
        }


def _map(path: pathlib.Path, dtype: str, length: int) -> np.ndarray:
    wanted = length * np.dtype(dtype).itemsize
    if path.stat().st_size != wanted:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes where {wanted} are wanted")
    return np.memmap(path, dtype, mode="r") if length else np.zeros(0, dtype)


@dataclasses.dataclass(frozen=True)
class TokensToText:
    """The `to_text` of a task with `TokenFiles`: keeps tokens and text of an example unchanged."""

    def __call__(self, example: RawExample) -> TextExample:
        return TextExample(
            inputs=example["inputs"],
            targets=example["targets"],
            references=tuple(example["references"]),
            inputs_ids=tuple(example["inputs_ids"]),
            targets_ids=tuple(example["targets_ids"]),
        )
