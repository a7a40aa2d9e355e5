"""Tokenizers of Hugging Face checkpoints as vocabularies, using the package `tokenizers`."""

import dataclasses
import functools
import importlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from gkd_jax.common import hub
from gkd_jax.data.vocabularies import Piece, byte_of, fingerprint_of_pieces, up_to_eos

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
    """The vocabulary of a tokenizer.json, with special tokens from the files beside it.

    End-of-sequence tokens are read from generation_config.json (chat models have several), or else
    from config.json or tokenizer_config.json. A tokenizer without a padding token pads with its
    first end-of-sequence token, or else with id 0. Masks are explicit, so any id is safe.

    Attributes:
      path: directory of a checkpoint, its name on the hub, or a tokenizer.json.
      eos_id: the only end-of-sequence token; None reads the tokens from the files.
    """

    path: str | os.PathLike[str]
    eos_id: int | None = None

    @property
    def name(self) -> str:
        return f"HFTokenizer({os.fspath(self.path)!r})"

    @functools.cached_property
    def size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        if self.eos_id is not None:
            return (self.eos_id,)
        for file in ("generation_config.json", "config.json"):
            found = self._settings(file).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
        found = self._special("eos_token")
        return () if found is None else (found,)

    @functools.cached_property
    def pad_id(self) -> int:
        found = self._special("pad_token")
        if found is None:
            found = self._settings("config.json").get("pad_token_id")
        if found is not None and found >= 0:
            return found
        return self.eos_ids[0] if self.eos_ids else 0

    @functools.cached_property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence token, or None if the tokenizer has none."""
        return self._special("bos_token")

    @functools.cached_property
    def fingerprint(self) -> str:
        pieces = (self._tokenizer.id_to_token(token) or "" for token in range(self.size))
        # Sentinels are renamed as in T5's SentencePiece models in seqio, so that a tokenizer and a
        # SentencePiece model with the same pieces have the same fingerprint.
        named = (f"▁{piece}" if re.fullmatch(r"<extra_id_\d+>", piece) else piece
                 for piece in pieces)  # fmt: skip
        return fingerprint_of_pieces(piece.encode("utf-8") for piece in named)

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Piece of each id, according to the tokenizer's decoder.

        Raises:
          ValueError: this kind of tokenizer (such as WordPiece) does not define the bytes of each
            token.
        """
        settings = json.loads(self._tokenizer.to_str())
        decoders = _kinds(settings["decoder"])
        if not decoders or decoders - _DECODERS:
            raise ValueError(
                f"the text of each token is known of byte-level and SentencePiece tokenizers; got "
                f"{self.name} with the decoders {sorted(decoders)}. Take a model with another "
                "tokenizer."
            )
        added = self._tokenizer.get_added_tokens_decoder()
        return tuple(self._piece(token, added, decoders) for token in range(self.size))

    def _piece(self, token: int, added: dict[int, Any], decoders: set[str]) -> Piece:
        piece = self._tokenizer.id_to_token(token)
        if token in added and added[token].special:
            return piece
        if piece is None or token in added:
            return None if piece is None else piece.encode("utf-8")
        if "ByteLevel" in decoders:
            return bytes(_byte_letters()[letter] for letter in piece)
        if "ByteFallback" in decoders and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return byte_of(piece)
        if decoders & {"Metaspace", "Replace"}:
            piece = piece.replace("▁", " ")
        return piece.encode("utf-8")

    def encode(self, text: str) -> list[int]:
        """Returns token ids; names of special tokens in the text become those tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        tokens = up_to_eos(ids, self.eos_ids)
        return self._tokenizer.decode(
            [token for token in tokens if 0 <= token < self.size], skip_special_tokens=True
        )

    @functools.cached_property
    def folder(self) -> epath.Path:
        """Folder of the tokenizer's files."""
        path = hub.find(self.path)
        return path.parent if path.name.endswith(".json") else path

    @functools.cached_property
    def _tokenizer(self) -> Any:
        file = self.folder / TOKENIZER
        if epath.Path(self.path).name.endswith(".json"):
            file = epath.Path(self.path)
        if not file.exists():
            raise FileNotFoundError(
                f"HFTokenizer.path names {os.fspath(self.path)!r}, where there is no {TOKENIZER}. "
                "Give the directory of a checkpoint that has one; a SentencePiece model "
                "(tokenizer.model, spiece.model) is read by SentencePieceVocabulary."
            )
        try:
            tokenizers = importlib.import_module("tokenizers")
        except ImportError as error:
            raise ValueError(
                "HFTokenizer needs the package tokenizers, which cannot be imported "
                f"({error}). Install it with: pip install 'gkd_jax[hf]'"
            ) from error
        try:
            return tokenizers.Tokenizer.from_str(file.read_text())
        # The package raises plain Exception for a broken file.
        except Exception as error:
            raise ValueError(
                f"HFTokenizer.path names {os.fspath(file)!r}, which is no tokenizer: {error}. Copy "
                "it again from its source."
            ) from error

    def _settings(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        if not file.exists():
            return {}
        try:
            return dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{os.fspath(file)!r} beside HFTokenizer.path is not JSON: {error}. Copy it again "
                "from its source."
            ) from error

    def _special(self, name: str) -> int | None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = self._settings(file).get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if text is not None:
                return self._tokenizer.token_to_id(text)
        return None

    def __getstate__(self) -> dict[str, Any]:
        # A pickled copy loads the tokenizer again.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# Supported decoders: those of byte-level BPE, SentencePiece models and character tokenizers.
_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*map(_kinds, decoder["decoders"]))
    return {decoder["type"]}


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Maps letters to bytes: byte-level tokenizers write each byte of a piece as a letter.

    A byte that is a printable character of Latin-1 is written as this character. All other bytes
    are written as the characters from U+0100 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(others))]
    return dict(zip(letters, [*visible, *others], strict=True))
