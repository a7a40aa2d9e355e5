"""Vocabularies: conversion of text to token ids and back, with a fingerprint of the mapping."""

import dataclasses
import functools
import hashlib
import importlib
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, Protocol, TypeAlias

from gkd_jax.data.text_files import blocks

Piece: TypeAlias = bytes | str | None
"""The piece of a token id: `bytes` if the token stands for text, `str` (the token's name) if it
does not, None if the id has neither. The concatenated bytes of a sequence of tokens are its
decoded text, except that decoding may drop a leading space. Vocabularies that know their pieces
have an attribute `pieces`, with one piece for each id in order."""


class Vocabulary(Protocol):
    """The interface of a vocabulary."""

    @property
    def name(self) -> str:
        """Name in messages."""
        ...

    @property
    def size(self) -> int:
        """Number of ids in use. A model's output layer may have more entries, which are padding."""
        ...

    @property
    def pad_id(self) -> int:
        """Padding token. It may equal an end-of-sequence token.

        This is safe, since masks are explicit and never inferred from the padding token.
        """
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End-of-sequence tokens; may be empty. The pipeline appends the first of them."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence token, or None if there is none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of the mapping from id to piece."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without beginning or end of sequence."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text up to the first end of sequence; padding and unused ids are skipped."""
        ...


def fingerprint_of_pieces(pieces: Iterable[bytes]) -> str:
    """Returns the hex digest of pieces, which are given in the order of their ids."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(struct.pack("<I", len(piece)) + piece)
    return digest.hexdigest()


def up_to_eos(ids: Sequence[int], eos_ids: tuple[int, ...]) -> list[int]:
    """Returns the ids before the first end of sequence, as Python integers."""
    kept: list[int] = []
    for token in ids:
        if token in eos_ids:
            break
        kept.append(int(token))
    return kept


_OWN_TOKENS = (
    ", or have it read its own tokens by teachers.CrossTokenizerTeacher "
    "(gin_configs/methods/cross_tokenizer.gin)"
)


def byte_of(piece: str) -> bytes:
    """Returns the byte of a byte-fallback piece such as '<0x0A>'."""
    return bytes([int(piece[3:5], 16)])


def check_same_vocabulary(
    student: Vocabulary, other: Vocabulary, *, whose: str = "teacher"
) -> None:
    """Checks that each id means the same piece in two vocabularies; equal sizes are not enough.

    Args:
      student: vocabulary of the training data.
      other: vocabulary to compare with it.
      whose: owner of the other vocabulary, for error messages.

    Raises:
      ValueError: the pieces, the padding tokens or the end-of-sequence tokens differ.
    """
    special = [(one.pad_id, one.eos_ids) for one in (student, other)]
    if student.fingerprint == other.fingerprint and special[0] != special[1]:
        raise ValueError(
            f"Student and {whose} must pad and end outputs alike; got padding and end-of-sequence "
            f"ids {special[0]} (student, {student.name}) and {special[1]} ({whose}, "
            f"{other.name}). Give both the same vocabulary."
        )
    if student.fingerprint != other.fingerprint:
        raise ValueError(
            f"Student and {whose} must share one vocabulary: a token id must mean the same piece "
            f"to both. The student's is {student.name} ({student.size} ids, "
            f"{student.fingerprint[:12]}), the {whose}'s {other.name} ({other.size} ids, "
            f"{other.fingerprint[:12]}). Give the student the {whose}'s vocabulary, or take "
            f"another {whose}{_OWN_TOKENS if whose == 'teacher' else ''}."
        )


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """UTF-8 bytes with ByT5's ids: 0 padding, 1 end of sequence, 2 unknown, b + 3 for byte b."""

    _OFFSET = 3

    @property
    def name(self) -> str:
        return "ByteVocabulary()"

    @property
    def size(self) -> int:
        return self._OFFSET + 256

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (1,)

    @property
    def bos_id(self) -> None:
        return None

    @property
    def fingerprint(self) -> str:
        specials = (b"<pad>", b"</s>", b"<unk>")
        return fingerprint_of_pieces((*specials, *(b"<0x%02X>" % byte for byte in range(256))))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Piece of each id."""
        return ("<pad>", "</s>", "<unk>", *(bytes([byte]) for byte in range(256)))

    def encode(self, text: str) -> list[int]:
        return [byte + self._OFFSET for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text up to the first end of sequence.

        Bytes that are not UTF-8, which a model may generate, are skipped as in ByT5.
        """
        tokens = up_to_eos(ids, self.eos_ids)
        text = bytes(token - self._OFFSET for token in tokens if self._OFFSET <= token < self.size)
        return text.decode("utf-8", errors="ignore")


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece model, with its ids for end of sequence, padding and unknown.

    A model without a padding token (Llama) pads with its end-of-sequence token, or else with id 0.
    Masks are explicit, so either id is safe.

    Attributes:
      path: the model file, a local path or a URL ('gs://...').
      extra_ids: number of sentinels '<extra_id_0>', ... that are added after the model's pieces.
        The first one has the highest id, as in seqio (T5: 100).
      eos_id: end-of-sequence id to use instead of the model's own; None uses the model's own.
    """

    path: str | os.PathLike[str]
    extra_ids: int = 0
    eos_id: int | None = None

    def __post_init__(self) -> None:
        if self.extra_ids < 0:
            raise ValueError(
                "SentencePieceVocabulary.extra_ids must not be negative; got "
                f"{self.extra_ids}. Set it to 0 or to the model's number of sentinels (T5: 100)."
            )

    @functools.cached_property
    def _processor(self) -> Any:
        return _load_sentencepiece(os.fspath(self.path), self.extra_ids)

    @property
    def name(self) -> str:
        extra = f", extra_ids={self.extra_ids}" if self.extra_ids else ""
        return f"SentencePieceVocabulary({os.fspath(self.path)!r}{extra})"

    @functools.cached_property
    def size(self) -> int:
        return self._processor.get_piece_size()

    @functools.cached_property
    def pad_id(self) -> int:
        if self._processor.pad_id() >= 0:
            return self._processor.pad_id()
        return self.eos_ids[0] if self.eos_ids else 0

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        if self.eos_id is not None:
            return (self.eos_id,)
        eos_id = self._processor.eos_id()
        return (eos_id,) if eos_id >= 0 else ()

    @functools.cached_property
    def bos_id(self) -> int | None:
        bos_id = self._processor.bos_id()
        return bos_id if bos_id >= 0 else None

    @functools.cached_property
    def fingerprint(self) -> str:
        processor = self._processor
        return fingerprint_of_pieces(
            processor.id_to_piece(token).encode("utf-8") for token in range(self.size)
        )

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Piece of each id."""
        return tuple(self._piece(token) for token in range(self.size))

    def _piece(self, token: int) -> Piece:
        processor = self._processor
        piece = processor.id_to_piece(token)
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            return piece
        if processor.is_byte(token):
            return byte_of(piece)
        return piece.replace("▁", " ").encode("utf-8")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        tokens = up_to_eos(ids, self.eos_ids)
        # Ids beyond the size belong to a padded output layer; SentencePiece raises an error for
        # them. Only a padding token that the model defines is skipped. If `pad_id` falls back to
        # another id, that id is an ordinary token and is decoded.
        padding = self._processor.pad_id()
        return self._processor.decode(
            [token for token in tokens if 0 <= token < self.size and token != padding]
        )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled copy loads the processor again.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def import_sentencepiece() -> ModuleType:
    """Imports the optional package sentencepiece.

    Raises:
      ValueError: the package is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ValueError(
            "a SentencePiece vocabulary needs the package sentencepiece, which cannot be imported "
            f"({error}). Install it with: pip install 'gkd_jax[text]'"
        ) from error


_load_lock = threading.Lock()


def _load_sentencepiece(path: str, extra_ids: int) -> Any:
    setting = "SentencePieceVocabulary.path"
    model = b"".join(blocks(path, setting=setting))
    sentencepiece = import_sentencepiece()
    try:
        # SentencePiece accepts an empty model without an error, so an empty file is rejected here.
        if not model:
            raise ValueError("the file is empty")
        processor = sentencepiece.SentencePieceProcessor()
        with _load_lock:
            processor.LoadFromSerializedProto(model + _sentinels(extra_ids))
        if not processor.get_piece_size() > extra_ids:
            raise ValueError("it holds no pieces")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{setting} names {path!r}, which is not a SentencePiece model: {error}. Name a "
            "'.model' file that SentencePiece made, e.g. with "
            "`python -m gkd_jax.data.train_vocabulary`."
        ) from error
    return processor


def _sentinels(extra_ids: int) -> bytes:
    """Returns the extra pieces in serialized form, to be appended to a serialized model.

    Concatenating serialized protocol buffers concatenates their repeated fields. The pieces of a
    model are its repeated field 1, so they can be added without a protobuf library. Each piece has
    the fields 1 (text), 2 (score) and 3 (type, which is 4 for user-defined pieces).
    """
    pieces = []
    for number in reversed(range(extra_ids)):
        piece = f"▁<extra_id_{number}>".encode()
        message = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", 0.0)
        message += b"\x18\x04"
        pieces.append(b"\x0a" + bytes([len(message)]) + message)
    return b"".join(pieces)


def describe_vocabulary(vocabulary: Vocabulary) -> dict[str, Any]:
    """Describes a vocabulary as JSON, for the checkpoints of models trained with it."""
    return {
        "name": vocabulary.name,
        "size": vocabulary.size,
        "fingerprint": vocabulary.fingerprint,
    }
