"""Vocabularies: text to token ids and back, with a fingerprint of what each id means."""

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
"""What a token id writes: bytes of text; or the name of a token without text; or nothing at all.
The bytes of several tokens, one after another, are those of the text that they decode to, but for
a space at its beginning. A vocabulary that can tell has `pieces`, one for each id in order."""


class Vocabulary(Protocol):
    """What the pipeline, evaluation and checks know of a vocabulary."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def size(self) -> int:
        """Number of ids with a meaning; a model's output layer may be padded beyond it."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows on the right. May be an end-of-sequence id: nothing is inferred from it."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence, the first of which the pipeline appends; may be empty."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text; None where there is none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of the mapping from id to piece."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without beginning or end of sequence."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first end of sequence; padding and meaningless ids are left out."""
        ...


def fingerprint_of_pieces(pieces: Iterable[bytes]) -> str:
    """Hex digest of a table of pieces in the order of their ids."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(struct.pack("<I", len(piece)) + piece)
    return digest.hexdigest()


def up_to_eos(ids: Sequence[int], eos_ids: tuple[int, ...]) -> list[int]:
    """The ids before the first end of sequence, as Python integers."""
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
    """The byte of a piece such as '<0x0A>', which stands for what no other piece writes."""
    return bytes([int(piece[3:5], 16)])


def check_same_vocabulary(
    student: Vocabulary, other: Vocabulary, *, whose: str = "teacher"
) -> None:
    """Refuses a vocabulary whose ids mean other pieces than the student's, equal sizes or not.

    Args:
      student: that of the training data.
      other: the one to compare.
      whose: what the message calls the other.

    Raises:
      ValueError: the pieces, the padding id or the ends of sequence differ; names both.
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
    """UTF-8 bytes, in ByT5's convention: pad 0, eos 1, unk 2, byte b is id 3 + b."""

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
        """What each id writes."""
        return ("<pad>", "</s>", "<unk>", *(bytes([byte]) for byte in range(256)))

    def encode(self, text: str) -> list[int]:
        return [byte + self._OFFSET for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8, which a model may well produce, are left out (as in ByT5)."""
        tokens = up_to_eos(ids, self.eos_ids)
        text = bytes(token - self._OFFSET for token in tokens if self._OFFSET <= token < self.size)
        return text.decode("utf-8", errors="ignore")


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece model; end of sequence, padding and unknown are the model's own ids.

    Where the model has no padding (Llama), the end of sequence serves, or else id 0: masks are
    explicit, so either is safe.

    Attributes:
      path: the model file, local or a URL ('gs://...').
      extra_ids: number of sentinels '<extra_id_0>', ... added after the model's pieces, the
        first of which has the highest id, as in seqio (T5: 100).
      eos_id: overrides the model's end-of-sequence id.
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
        """What each id writes."""
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
        # Ids beyond the size are rows of a padded output layer, which SentencePiece would
        # refuse. Only a padding of the model's own is left out: another id has a meaning.
        padding = self._processor.pad_id()
        return self._processor.decode(
            [token for token in tokens if 0 <= token < self.size and token != padding]
        )

    def __getstate__(self) -> dict[str, Any]:
        # The processor is loaded again where the vocabulary is copied to.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def import_sentencepiece() -> ModuleType:
    """The optional package sentencepiece.

    Raises:
      ValueError: it is not installed; says how to get it.
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
        # An empty model would be taken for one that is to be loaded later.
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
    """The extra pieces as a part of a serialised model, to be joined to the end of one.

    Two protocol buffers end to end are one whose repeated fields are joined, so the pieces
    (field 1: piece = 1, score = 2, type = 3 with 4 for user-defined) need no protobuf library.
    """
    parts = []
    for number in reversed(range(extra_ids)):
        piece = f"▁<extra_id_{number}>".encode()
        message = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", 0.0)
        message += b"\x18\x04"
        parts.append(b"\x0a" + bytes([len(message)]) + message)
    return b"".join(parts)


def describe_vocabulary(vocabulary: Vocabulary) -> dict[str, Any]:
    """What a checkpoint tells of the vocabulary that its model was trained with, as JSON."""
    return {
        "name": vocabulary.name,
        "size": vocabulary.size,
        "fingerprint": vocabulary.fingerprint,
    }
