"""A tokenizer of single letters, as the package tokenizers writes it."""

import json
import pathlib

import pytest

tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|end|>")
LETTERS = "".join(chr(code) for code in range(32, 32 + 90)) + "\n"
# A special token as older files have it.
ADDED = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False}


def save(folder: pathlib.Path, *, letters: str = LETTERS, **settings) -> pathlib.Path:
    """Writes tokenizer.json and tokenizer_config.json: 96 ids."""
    pieces = [*SPECIAL, *dict.fromkeys(letters)]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), "isolated"
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": ADDED}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder
