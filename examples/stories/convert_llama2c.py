"""Converts a model of llama2.c (github.com/karpathy/llama2.c) to a Hugging Face checkpoint.

    python examples/stories/convert_llama2c.py --model=stories15M.bin --tokenizer=tokenizer.bin \
      --output=stories15M

The binary is a header of seven int32 followed by float32 arrays. Its queries and keys are rotated
in pairs (2i, 2i + 1), those of a Hugging Face checkpoint in pairs (i, i + K/2), so that their rows
are reordered. The tokenizer becomes a tokenizer.json of byte-pair merges, derived from the pieces'
scores.
"""

import argparse
import json
import pathlib
import struct
from typing import Any

import jax
import numpy as np
import tokenizers
from etils import epath

from gkd_jax.checkpoints.hf import write_hf_checkpoint
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.decoder_only import DecoderOnly

BOS, EOS = 1, 2


def read_model(path: pathlib.Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads the configuration, and the parameters as a tree of gkd_jax."""
    header = struct.unpack("<7i", path.read_bytes()[:28])
    dim, mlp_dim, num_layers, num_heads, num_kv_heads, vocab_size, max_length = header
    head_dim = dim // num_heads
    config = DecoderConfig(
        vocab_size=abs(vocab_size), emb_dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, mlp_dim=mlp_dim, layer_kinds=("full",) * num_layers,
        norm_epsilon=1e-5, tie_embeddings=vocab_size > 0, dtype="float32",
    )  # fmt: skip
    numbers = np.memmap(path, "<f4", mode="r", offset=28)
    offset = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal offset
        start, offset = offset, offset + int(np.prod(shape))
        return np.array(numbers[start:offset]).reshape(shape)

    def in_halves(kernels: np.ndarray, heads: int) -> np.ndarray:
        """Reorders [layers, heads * K, D] from pairs (2i, 2i + 1) to pairs (i, i + K/2)."""
        pairs = kernels.reshape(num_layers, heads, head_dim // 2, 2, dim)
        return pairs.swapaxes(2, 3).reshape(num_layers, heads * head_dim, dim)

    embedding = take(abs(vocab_size), dim)
    pre_attention = take(num_layers, dim)
    query = in_halves(take(num_layers, num_heads * head_dim, dim), num_heads)
    key = in_halves(take(num_layers, num_kv_heads * head_dim, dim), num_kv_heads)
    value = take(num_layers, num_kv_heads * head_dim, dim)
    out = take(num_layers, dim, num_heads * head_dim)
    pre_mlp = take(num_layers, dim)
    gate = take(num_layers, mlp_dim, dim)
    down = take(num_layers, dim, mlp_dim)
    up = take(num_layers, mlp_dim, dim)
    final = take(dim)
    take(max_length, head_dim)  # Cosines and sines, which are computed.
    params: dict[str, Any] = {
        "token_embedder": {"embedding": embedding},
        "decoder_norm": {"scale": final},
    }
    if not config.tie_embeddings:
        params["logits_dense"] = {"kernel": take(abs(vocab_size), dim).T}
    for layer in range(num_layers):
        params[f"layers_{layer}"] = {
            "pre_attention_norm": {"scale": pre_attention[layer]},
            "attention": {
                name: {"kernel": kernels[layer].T}
                for name, kernels in (
                    ("query", query),
                    ("key", key),
                    ("value", value),
                    ("out", out),
                )
            },
            "pre_mlp_norm": {"scale": pre_mlp[layer]},
            "mlp": {
                name: {"kernel": kernels[layer].T}
                for name, kernels in (("wi_0", gate), ("wi_1", up), ("wo", down))
            },
        }
    assert offset == len(numbers), f"{path} has {len(numbers)} numbers, and {offset} were read"
    return config, params


def read_pieces(path: pathlib.Path) -> list[tuple[str, float]]:
    """Reads pieces and scores: an int32 (the longest), then score, length and bytes of each."""
    content, offset, pieces = path.read_bytes(), 4, []
    while offset < len(content):
        score, length = struct.unpack_from("<fi", content, offset)
        offset += 8
        pieces.append((content[offset : offset + length].decode("utf-8"), score))
        offset += length
    return pieces


def make_tokenizer(pieces: list[tuple[str, float]]) -> tokenizers.Tokenizer:
    """Builds SentencePiece's byte-pair encoding, with bytes for text without pieces."""
    # llama2.c replaces SentencePiece's mark by spaces, and spells specials and bytes differently.
    specials = {0: "<unk>", BOS: "<s>", EOS: "</s>"}
    spelled = specials | {3 + byte: f"<0x{byte:02X}>" for byte in range(256)}
    names = [spelled.get(token, text.replace(" ", "▁")) for token, (text, _) in enumerate(pieces)]
    vocabulary = {name: token for token, name in enumerate(names)}
    merges: list[tuple[float, int, str, str]] = []
    for token, name in enumerate(names):
        if token < 259:  # Specials and single bytes are never merged.
            continue
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-pieces[token][1], vocabulary[left], left, right))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, [(left, right) for *_, left, right in sorted(merges)],
            unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(list(specials.values()))
    return tokenizer


def main() -> None:
    """Reads both files and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help=".bin file of the model")
    parser.add_argument(
        "--tokenizer", type=pathlib.Path, required=True, help=".bin file of the tokenizer"
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, help="directory to create")
    flags = parser.parse_args()
    config, params = read_model(flags.model)
    model = DecoderOnly(config)
    shapes = jax.tree.map(lambda leaf: leaf.shape, model.abstract_params())
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)
    # No end of sequence was trained: a story ends at the beginning of the next one.
    described = {"bos_token_id": BOS, "eos_token_id": BOS}
    write_hf_checkpoint(epath.Path(flags.output), model, params, dtype="float32")
    make_tokenizer(read_pieces(flags.tokenizer)).save(str(flags.output / "tokenizer.json"))
    (flags.output / "generation_config.json").write_text(json.dumps(described) + "\n")
    specials = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<unk>"}
    (flags.output / "tokenizer_config.json").write_text(json.dumps(specials) + "\n")
    print(f"written: {flags.output}")


if __name__ == "__main__":
    main()
