"""Conversion of seqio vocabularies."""

import dataclasses
import functools
from typing import Any

from gkd_jax.data import vocabularies


def wrap_vocabulary(vocabulary: Any) -> vocabularies.Vocabulary:
    """Converts a seqio vocabulary, if possible to an equal one that does not need TensorFlow."""
    import seqio

    # Not isinstance: a subclass may map text to other ids.
    if type(vocabulary) is seqio.ByteVocabulary and not vocabulary.extra_ids:
        return vocabularies.ByteVocabulary()
    if type(vocabulary) is seqio.SentencePieceVocabulary:
        path = vocabulary.sentencepiece_model_file
        return vocabularies.SentencePieceVocabulary(path, extra_ids=vocabulary.extra_ids)
    return _SeqioVocabulary(vocabulary)


@dataclasses.dataclass(frozen=True)
class _SeqioVocabulary:
    """Wrapper of a seqio vocabulary of any other class."""

    vocabulary: Any

    @property
    def name(self) -> str:
        return f"seqio {type(self.vocabulary).__name__}"

    @property
    def size(self) -> int:
        return int(self.vocabulary.vocab_size)

    @property
    def pad_id(self) -> int:
        return int(self.vocabulary.pad_id)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        eos_id = self.vocabulary.eos_id
        return () if eos_id is None else (int(eos_id),)

    @property
    def bos_id(self) -> int | None:
        bos_id = self.vocabulary.bos_id
        return None if bos_id is None else int(bos_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        pieces = (f"{self.vocabulary.decode([token])}".encode() for token in range(self.size))
        return vocabularies.fingerprint_of_pieces(pieces)

    def encode(self, text: str) -> list[int]:
        return list(self.vocabulary.encode(text))

    def decode(self, ids: Any) -> str:
        tokens = vocabularies.up_to_eos(ids, self.eos_ids)
        return self.vocabulary.decode([token for token in tokens if token != self.pad_id])
