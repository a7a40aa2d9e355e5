"""Released decoder-only sizes are those of the published config.json files."""

import math

import jax
import pytest

from gkd_jax.models import sizes
from gkd_jax.models.decoder_only import DecoderOnly
from gkd_jax.models.families import model_from_hf

# What computes something in the config.json of huggingface.co/<repository>, as published.
LLAMA3 = dict(
    model_type="llama", attention_bias=False, hidden_act="silu", num_key_value_heads=8,
    rms_norm_eps=1e-5, rope_scaling=None, rope_theta=500000.0, tie_word_embeddings=False,
    vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip
QWEN3 = dict(
    model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu",
    num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000,
    sliding_window=None, use_sliding_window=False, vocab_size=151936,
    max_position_embeddings=40960,
)  # fmt: skip


def widths(hidden_size, layers, heads, intermediate_size, **others):
    return dict(
        hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=intermediate_size, **others,
    )  # fmt: skip


PUBLISHED = {
    "llama3-8b": LLAMA3 | widths(4096, 32, 32, 14336),  # meta-llama/Meta-Llama-3-8B
    "llama3-70b": LLAMA3 | widths(8192, 80, 64, 28672),  # meta-llama/Meta-Llama-3-70B
    "qwen3-0.6b": QWEN3 | widths(1024, 28, 16, 3072, tie_word_embeddings=True),  # Qwen/Qwen3-0.6B
    "qwen3-1.7b": QWEN3 | widths(2048, 28, 16, 6144, tie_word_embeddings=True),
    "qwen3-4b": QWEN3 | widths(2560, 36, 32, 9728, tie_word_embeddings=True),
    "qwen3-8b": QWEN3 | widths(4096, 36, 32, 12288, tie_word_embeddings=False),
    "qwen3-14b": QWEN3 | widths(5120, 40, 40, 17408, tie_word_embeddings=False),
    "qwen3-32b": QWEN3 | widths(5120, 64, 64, 25600, tie_word_embeddings=False),
}
# With a tied output layer counted once.
COUNTS = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", sizes.DECODER_NAMES)
def test_sizes_are_the_published_ones(name):
    how = dict(dropout_rate=0.1, dtype="float32", scan_layers=True, remat_policy="full")
    assert sizes.decoder_config(name, **how) == model_from_hf(PUBLISHED[name], **how).config


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != "qwen3-1.7b" else ()) for n in COUNTS]
)
def test_sizes_have_the_released_parameter_counts(name):
    leaves = jax.tree.leaves(DecoderOnly(sizes.decoder_config(name)).abstract_params())
    assert sum(math.prod(leaf.shape) for leaf in leaves) == COUNTS[name]


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"got 'llama-3'.*llama3-8b.*qwen3-32b.*hf\.gin"):
        sizes.decoder_config("llama-3")
