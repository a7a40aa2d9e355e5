"""Alignment of the tokens of two vocabularies by their text: spans and classes of tokens.

Tokens of two vocabularies are compared by the bytes of text that they spell. A span is the text
between two consecutive positions at which both tokenizations have a boundary. The class of a token
is the longest prefix of its text that is a token of both vocabularies. Since classes exist in both
vocabularies, distributions over classes can be compared.
"""

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from gkd_jax.common.array_types import Int
from gkd_jax.data.vocabularies import Piece, Vocabulary

_END = "<end of sequence>"
_SPACE = b" "

Tokens: TypeAlias = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Table:
    """The classes of the tokens of student and teacher. Each class has tokens of both.

    Attributes:
      student: class of each entry of the student's output layer.
      teacher: class of each entry of the teacher's output layer.
      numbers: maps the text of a class, or the name of a token without text, to the class.
      rest: class of the tokens that belong to no class in `numbers`. It is `len(numbers)`, unless
        only one vocabulary has such tokens. In that case it is one of the classes in `numbers`,
        since a class must have tokens of both vocabularies.
    """

    student: Int[np.ndarray, " V"]
    teacher: Int[np.ndarray, " W"]
    numbers: dict[Piece, int]
    rest: int

    def find(self, text: bytes) -> int:
        """Returns the class of the longest prefix of `text` that has a class, or else `rest`."""
        for length in range(len(text), 0, -1):
            number = self.numbers.get(text[:length])
            if number is not None:
                return number
        return self.rest


@dataclasses.dataclass(frozen=True)
class Alignment:
    """A teacher's tokens of an output, and the spans that both tokenizations share.

    Attributes:
      teacher_ids: token ids of the output's visible text in the teacher's vocabulary, followed by
        the teacher's end-of-sequence token if the output has an end of sequence.
      spans: number of the span of each of the student's tokens, increasing from 1; 0 outside of
        all spans.
      teacher_spans: the same for the teacher's tokens.
      texts: bytes of each span in order; None for the end of sequence.
    """

    teacher_ids: list[int]
    spans: list[int]
    teacher_spans: list[int]
    texts: list[bytes | None]


class CommonText:
    """Compares two vocabularies by the text of their tokens.

    A SentencePiece vocabulary encodes a text with a hidden space at its start, which decoding
    drops. If only one of the two vocabularies has hidden spaces, the first token of a text has
    classes of its own (`first`), which are determined without the hidden space.

    Args:
      student: the student's vocabulary.
      teacher: the teacher's vocabulary.
      sizes: sizes of the output layers of student and teacher; entries beyond a vocabulary are
        padding.

    Attributes:
      student: the student's vocabulary.
      teacher: the teacher's vocabulary.
      table: classes of tokens.
      first: classes of the first token of a text.

    Raises:
      ValueError: a vocabulary does not provide the bytes of its tokens, or the vocabularies have no
        token in common.
    """

    def __init__(self, student: Vocabulary, teacher: Vocabulary, sizes: tuple[int, int]):
        self.student, self.teacher = student, teacher
        self._pieces = _pieces(student), _pieces(teacher)
        self._hidden = hidden_spaces(student), hidden_spaces(teacher)
        self.table = _table(*self._pieces, sizes)
        self.first = self.table
        # If both or neither hide a space, first tokens are compared in the same way as others.
        self._shows = [False, False]
        if bool(self._hidden[0]) != bool(self._hidden[1]):
            self._shows = [bool(hidden) for hidden in self._hidden]
            own, theirs = (
                [_without_space(piece) for piece in pieces] if shows else pieces
                for pieces, shows in zip(self._pieces, self._shows, strict=True)
            )
            self.first = _table(own, theirs, sizes)

    def align(self, ids: Tokens) -> Alignment:
        """Encodes an output of the student with the teacher's vocabulary and aligns both.

        Args:
          ids: the student's tokens, up to and including the end of sequence if the output has one.
        """
        ended = bool(ids) and ids[-1] in self.student.eos_ids
        own = [self._text(0, token) for token in (ids[:-1] if ended else ids)]
        shown = b"".join(text or b"" for text in _shown(own, self._hidden[0]))
        # Bytes that are not valid UTF-8 are left out of the text, and so belong to no span.
        read = self.teacher.encode(shown.decode("utf-8", errors="ignore"))
        theirs = [self._text(1, token) for token in read]
        if self._shows[0]:
            own = _shown(own, self._hidden[0])
        if self._shows[1]:
            theirs = _shown(theirs, self._hidden[1])
        spans, teacher_spans, texts = _spans(own, theirs)
        found: list[bytes | None] = [*texts]
        if ended:
            has_end = bool(self.teacher.eos_ids)
            number = len(texts) + 1 if has_end else 0
            read = [*read, *self.teacher.eos_ids[:1]]
            spans, teacher_spans = [*spans, number], [*teacher_spans, *([number] * has_end)]
            found += [None] * has_end
        return Alignment(read, spans, teacher_spans, found)

    @property
    def num_classes(self) -> int:
        """Number of classes, not counting the additional class `Table.rest`."""
        return max(len(self.table.numbers), len(self.first.numbers))

    def class_of(self, text: bytes | None, *, is_first: bool) -> tuple[int, bool]:
        """Returns the class of a span, and whether the class covers all of its text."""
        table = self.first if is_first else self.table
        if text is None:
            return table.numbers[_END], True
        return table.find(text), text in table.numbers

    def _text(self, side: int, token: int) -> bytes | None:
        pieces = self._pieces[side]
        piece = pieces[token] if 0 <= token < len(pieces) else None
        return piece if isinstance(piece, bytes) else None


@functools.lru_cache(maxsize=8)
def common_text(student: Vocabulary, teacher: Vocabulary, sizes: tuple[int, int]) -> CommonText:
    """Returns the `CommonText` of two vocabularies, which is cached."""
    return CommonText(student, teacher, sizes)


def hidden_spaces(vocabulary: Vocabulary) -> int:
    """Returns the number of leading spaces that decoding drops: 0, 1, or -1 for all."""
    pieces = _pieces(vocabulary)
    word = next(
        (
            token
            for token, piece in enumerate(pieces)
            if isinstance(piece, bytes) and piece[:1] == _SPACE and piece[1:2].isalnum()
        ),
        None,
    )
    if word is None or vocabulary.decode([word]).startswith(" "):
        return 0
    spaces = [token for token, piece in enumerate(pieces) if piece == _SPACE]
    if spaces and not vocabulary.decode([spaces[0], word]).startswith(" "):
        return -1
    return 1


def _pieces(vocabulary: Vocabulary) -> list[Piece]:
    """Returns the piece of each id. All end-of-sequence tokens get the same name, `_END`."""
    pieces = getattr(vocabulary, "pieces", None)
    if pieces is None:
        raise ValueError(
            f"a teacher with a vocabulary of its own needs the text of each token; got "
            f"{vocabulary.name}, which does not tell it. Use ByteVocabulary, "
            "SentencePieceVocabulary or HFTokenizer."
        )
    found = list(pieces)
    for token in vocabulary.eos_ids:
        found[token] = _END
    return found


def _without_space(piece: Piece) -> Piece:
    if not isinstance(piece, bytes):
        return piece
    return piece.removeprefix(_SPACE) or None


def _shown(texts: Sequence[bytes | None], hidden: int) -> list[bytes | None]:
    """Returns the texts of the tokens of an output, without the hidden spaces at its start.

    `hidden` is the number of these spaces, as returned by `hidden_spaces`.
    """
    left = list(texts)
    for number, text in enumerate(left):
        while text and hidden and text[:1] == _SPACE:
            text, hidden = text[1:], hidden - 1
            left[number] = text
        if text:
            break
    return left


def _table(student: Sequence[Piece], teacher: Sequence[Piece], sizes: tuple[int, int]) -> Table:
    there = set(teacher)
    # In the order of the student's ids.
    common = dict.fromkeys(piece for piece in student if piece is not None and piece in there)
    numbers: dict[Piece, int] = {piece: number for number, piece in enumerate(common)}
    if not numbers:
        raise ValueError("the vocabularies of student and teacher have no token in common.")
    table = Table(np.zeros(0, np.int32), np.zeros(0, np.int32), numbers, rest=len(numbers))

    def classes(pieces: Sequence[Piece], size: int) -> np.ndarray:
        found = [
            table.find(piece) if isinstance(piece, bytes) else numbers.get(piece, table.rest)
            for piece in pieces
        ]
        return np.array([*found, *[table.rest] * (size - len(found))], np.int32)

    both = [classes(student, sizes[0]), classes(teacher, sizes[1])]
    rest = table.rest
    is_rest = [one == rest for one in both]
    if is_rest[0].any() != is_rest[1].any():
        # A class that only one side has would make divergences infinite.
        rest = numbers.get(_END, 0)
        both = [np.where(mask, rest, one) for mask, one in zip(is_rest, both, strict=True)]
    return Table(both[0].astype(np.int32), both[1].astype(np.int32), numbers, rest)


def _spans(
    own: Sequence[bytes | None], theirs: Sequence[bytes | None]
) -> tuple[list[int], list[int], list[bytes]]:
    """Returns the span number of each token of both sides, and the text of each span."""
    left, right = (b"".join(text or b"" for text in texts) for texts in (own, theirs))
    starts = _starts(own), _starts(theirs)
    numbers = [0] * len(own), [0] * len(theirs)
    found: list[bytes] = []
    cuts = [
        (a + step, b + step)
        for a, b, length in _equal_sections(left, right)
        for step in range(length + 1)
        if a + step in starts[0] and b + step in starts[1]
    ]
    for (x, y), (to_x, to_y) in itertools.pairwise(cuts):
        if x == to_x or left[x:to_x] != right[y:to_y]:
            continue
        found.append(left[x:to_x])
        for side, texts, start, end in ((0, own, x, to_x), (1, theirs, y, to_y)):
            for token in range(starts[side][start], starts[side][end]):
                if texts[token] is not None:
                    numbers[side][token] = len(found)
    return *numbers, found


def _starts(texts: Sequence[bytes | None]) -> dict[int, int]:
    """Maps each byte offset at which tokens with text start to the first of these tokens.

    The end of the text is mapped to the first empty token (b'') there; if there is no such token,
    to the number of tokens.
    """
    starts: dict[int, int] = {}
    offset = 0
    for token, text in enumerate(texts):
        if text is not None:
            starts.setdefault(offset, token)
            offset += len(text)
    starts.setdefault(offset, len(texts))
    return starts


def _equal_sections(left: bytes, right: bytes) -> list[tuple[int, int, int]]:
    """Returns (left offset, right offset, length) of each section that is equal on both sides."""
    if left == right:
        return [(0, 0, len(left))]
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    return [(block.a, block.b, block.size) for block in matcher.get_matching_blocks()]
