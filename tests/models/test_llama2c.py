"""A trained Llama of llama2.c, converted, against a forward pass in NumPy of the binary itself."""

import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_recipes import ROOT

from gkd_jax.checkpoints import hf, load
from gkd_jax.common.batch import Batch
from gkd_jax.data.hf_tokenizer import HFTokenizer
from gkd_jax.data.vocabularies import SentencePieceVocabulary
from gkd_jax.sampling.decode import decode
from gkd_jax.sampling.methods import Greedy, Sample

FILES = {
    "stories260K": ("stories260K.bin", "tok512.bin"),
    "stories15M": ("stories15M.bin", "tokenizer_v0.bin"),
}
NAMES = ["stories260K", pytest.param("stories15M", marks=pytest.mark.slow)]
BOS = 1
# What stories15M of llama2.c's README begins with.
OPENING = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def converted(external_data, tmp_path_factory):
    """Name to the checkpoint that the example's script writes."""
    pytest.importorskip("tokenizers")
    folders = {}

    def convert(name):
        if name not in folders:
            model, tokenizer = FILES[name]
            source = external_data / "stories" / name
            folders[name] = tmp_path_factory.mktemp("converted") / name
            command = [
                sys.executable, str(ROOT / "examples/stories/convert_llama2c.py"),
                f"--model={source / model}", f"--tokenizer={source / tokenizer}",
                f"--output={folders[name]}",
            ]  # fmt: skip
            subprocess.run(command, check=True)
        return folders[name]

    return convert


def numpy_logits(path, tokens: list[int]) -> np.ndarray:
    """llama2.c's forward pass in float64: rotations of neighbours, one token at a time."""
    content = path.read_bytes()
    dim, hidden, depth, heads, kv_heads, vocab, length = struct.unpack("<7i", content[:28])
    numbers = np.frombuffer(content, "<f4", offset=28).astype(np.float64)
    size, at = dim // heads, 0

    def take(*shape):
        nonlocal at
        part = numbers[at : at + int(np.prod(shape))].reshape(shape)
        at += part.size
        return part

    embedding, att_norm = take(vocab, dim), take(depth, dim)
    wq, wk = take(depth, heads * size, dim), take(depth, kv_heads * size, dim)
    wv, wo = take(depth, kv_heads * size, dim), take(depth, dim, heads * size)
    mlp_norm, w1 = take(depth, dim), take(depth, hidden, dim)
    w2, w3, final = take(depth, dim, hidden), take(depth, hidden, dim), take(dim)
    cosine, sine = take(length, size // 2), take(length, size // 2)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + 1e-5) * scale

    def rotate(x, position):
        pairs = x.reshape(-1, size // 2, 2)
        c, s = cosine[position], sine[position]
        first, second = pairs[..., 0], pairs[..., 1]
        return np.stack([first * c - second * s, first * s + second * c], -1).reshape(-1, size)

    keys, values = ([[] for _ in range(depth)] for _ in "kv")
    logits = []
    for position, token in enumerate(tokens):
        x = embedding[token]
        for layer in range(depth):
            y = norm(x, att_norm[layer])
            q = rotate(wq[layer] @ y, position)
            keys[layer].append(rotate(wk[layer] @ y, position))
            values[layer].append((wv[layer] @ y).reshape(-1, size))
            k, v = (np.stack(one[layer]).repeat(heads // kv_heads, 1) for one in (keys, values))
            scores = np.einsum("hk,lhk->hl", q, k) / np.sqrt(size)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            x = x + wo[layer] @ np.einsum("hl,lhk->hk", share, v).reshape(-1)
            y = norm(x, mlp_norm[layer])
            gate = w1[layer] @ y
            x = x + w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ y))
        logits.append(embedding @ norm(x, final))
    return np.stack(logits)


def our_logits(folder, tokens: list[int]) -> np.ndarray:
    model = hf.hf_model(str(folder), dtype="float32")
    params = load.load_params(folder, model.abstract_params())
    targets = jnp.asarray([*tokens[1:], 0])[None]
    batch = Batch(
        inputs=jnp.asarray(tokens[:1])[None], inputs_mask=jnp.ones((1, 1), bool),
        targets=targets, loss_weights=jnp.ones(targets.shape), example_id=jnp.arange(1),
    )  # fmt: skip
    return np.asarray(
        jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))(params, batch)
    )[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_perplexity_are_numpys(converted, external_data, name):
    """On a story that the model wrote itself, by our sampler: it finds it likely, as NumPy does."""
    folder = converted(name)
    model = hf.hf_model(str(folder), dtype="float32")
    params = load.load_params(folder, model.abstract_params())
    decoded = jax.jit(
        lambda p, key: decode(
            model, p, jnp.full((1, 1), BOS), jnp.ones((1, 1), bool), method=Sample(),
            max_length=64, eos_ids=(BOS,), pad_id=0, key=key,
        )
    )(params, jax.random.key(0))  # fmt: skip
    story = np.asarray(decoded.tokens[0])[: int(decoded.lengths[0])].tolist()
    tokens = [BOS, *story]
    expected = numpy_logits(external_data / "stories" / name / FILES[name][0], tokens)
    got = our_logits(folder, tokens)
    np.testing.assert_allclose(got, expected, atol=2e-4)

    def perplexity(logits):
        logits = np.asarray(logits, np.float64)[:-1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.exp(-np.mean(log_probs[np.arange(len(story)), story]))

    assert perplexity(got) == pytest.approx(perplexity(expected), rel=1e-5)
    assert perplexity(got) < 8


@pytest.mark.slow
def test_it_writes_the_story_that_it_is_known_for(converted):
    folder = converted("stories15M")
    model = hf.hf_model(str(folder), dtype="float32")
    params = load.load_params(folder, model.abstract_params())
    decoded = jax.jit(
        lambda p: decode(
            model, p, jnp.full((1, 1), BOS), jnp.ones((1, 1), bool), method=Greedy(),
            max_length=40, eos_ids=(BOS,), pad_id=0,
        )
    )(params)  # fmt: skip
    assert HFTokenizer(folder).decode(np.asarray(decoded.tokens[0])).startswith(OPENING)


def test_the_tokenizer_is_llama_2s(converted, external_data):
    """Merges read off the scores split every text as SentencePiece does."""
    ours = HFTokenizer(converted("stories15M"))
    theirs = SentencePieceVocabulary(external_data / "llama2_vocab" / "tokenizer.model")
    assert (ours.size, ours.bos_id, ours.eos_ids) == (theirs.size, theirs.bos_id, (BOS,))
    texts = [OPENING, "\u00dcber 300 M\u00e4nner, 2 dogs\nand a \u732b.", "tabs\tand  two spaces"]
    texts += (external_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:50]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
