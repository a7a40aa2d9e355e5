"""Shrunk models of each supported architecture, made and saved by transformers itself."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
T5_SIZES = dict(
    vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
    dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
T5_1_1 = T5_SIZES | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
GEMMA3_ROPE = {
    "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An architecture and a variant of it."""

    kind: str
    settings: dict[str, Any]


CASES = {
    "t5": Case("T5", T5_SIZES),
    "t5_1_1": Case("T5", T5_1_1),
    "ul2": Case("T5", T5_1_1 | dict(feed_forward_proj="gated-silu")),
    "llama2": Case("Llama", SIZES | dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama3": Case("Llama", SIZES | dict(rope_parameters=LLAMA3)),
    "llama_linear": Case(
        "Llama",
        SIZES | dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)),
    ),
    "llama_biases": Case(
        "Llama", SIZES | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "mistral": Case("Mistral", SIZES | dict(sliding_window=5, head_dim=12)),
    "qwen2": Case("Qwen2", SIZES | dict(tie_word_embeddings=True)),
    "qwen2_sliding": Case(
        "Qwen2", SIZES | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "qwen3": Case("Qwen3", SIZES | dict(head_dim=16)),
    "qwen3_yarn": Case("Qwen3", SIZES | dict(head_dim=16, rope_parameters=YARN)),
    "smollm3": Case("SmolLM3", SIZES | dict(num_hidden_layers=5)),
    "smollm3_sliding": Case(
        "SmolLM3", SIZES | dict(num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], sliding_window=5,
                                use_sliding_window=True, tie_word_embeddings=False),
    ),
    "gemma": Case("Gemma", SIZES | dict(head_dim=16)),
    "gemma2": Case(
        "Gemma2", SIZES | dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=24,
                               attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    ),
    "gemma3": Case(
        "Gemma3",
        SIZES | dict(num_hidden_layers=7, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
    ),
    "gemma3_stretched": Case(
        "Gemma3", SIZES | dict(num_hidden_layers=6, head_dim=16, sliding_window=5,
                               query_pre_attn_scalar=20, rope_parameters=GEMMA3_ROPE),
    ),
}  # fmt: skip


def is_t5(name: str) -> bool:
    return CASES[name].kind == "T5"


@functools.cache
def make(name: str) -> Any:
    """The network in torch, float32, with parameters far enough from 0 for each to matter."""
    case = CASES[name]
    config_class, model_class = {
        "T5": ("T5Config", "T5ForConditionalGeneration"),
        "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    }.get(case.kind, (f"{case.kind}Config", f"{case.kind}ForCausalLM"))
    config = getattr(transformers, config_class)(**case.settings)
    config._attn_implementation = "eager"
    is_tied = case.settings.get("tie_word_embeddings", True)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval().float()
    if case.kind == "T5" and not is_tied:
        # transformers 5 ties every new T5; a released T5 1.1 has a head of its own.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def save(name: str, folder: pathlib.Path, **options: Any) -> pathlib.Path:
    """Saves it as transformers does."""
    make(name).save_pretrained(folder, **options)
    return folder


def random_batch(seed: int = 0, rows: int = 5, inputs: int = 12, targets: int = 9) -> Any:
    """Prompts of different length, padded on the right, and outputs."""
    from gkd_jax.common.batch import Batch

    generator = np.random.default_rng(seed)
    lengths = np.array([inputs, 1, 7, 4, inputs - 1] * rows)[:rows]
    mask = np.arange(inputs)[None] < lengths[:, None]
    return Batch(
        inputs=np.where(mask, generator.integers(3, 96, (rows, inputs)), 0).astype(np.int32),
        inputs_mask=mask,
        targets=generator.integers(3, 96, (rows, targets)).astype(np.int32),
        loss_weights=np.ones((rows, targets), np.float32),
        example_id=np.arange(rows, dtype=np.int32),
    )


def one_row(batch: Any, row: int) -> Any:
    """A batch of one of its rows."""
    import jax

    return jax.tree.map(lambda leaf: leaf[row : row + 1], batch)


def torch_logits(name: str, batch: Any, model: Any = None) -> np.ndarray:
    """transformers' logits of each output token, row by row without padding."""
    model, rows = model or make(name), []
    with torch.no_grad():
        for inputs, mask, targets in zip(
            batch.inputs, batch.inputs_mask, batch.targets, strict=True
        ):
            prompt = torch.tensor(inputs[mask][None].astype(np.int64))
            output = torch.tensor(targets[None].astype(np.int64))
            if is_t5(name):
                start = torch.zeros((1, 1), dtype=torch.int64)
                fed = torch.cat([start, output[:, :-1]], dim=1)
                logits = model(input_ids=prompt, decoder_input_ids=fed).logits[0]
            else:
                whole = torch.cat([prompt, output[:, :-1]], dim=1)
                logits = model(input_ids=whole).logits[0, prompt.shape[1] - 1 :]
            rows.append(logits.numpy())
    return np.stack(rows)


def greedy(name: str, prompt: np.ndarray, max_length: int, eos_ids: tuple[int, ...]) -> list[int]:
    """What transformers generates greedily, without the prompt, up to an end of sequence.

    Without its cache, which for a T5 is as deep as the encoder.
    """
    ids = torch.tensor(prompt[None].astype(np.int64))
    output = make(name).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_length,
        eos_token_id=list(eos_ids), pad_token_id=0, use_cache=False,
    )[0].tolist()  # fmt: skip
    return output[1:] if is_t5(name) else output[len(prompt) :]


def from_pretrained(folder: pathlib.Path) -> tuple[Any, list[str], list[str]]:
    """A checkpoint as transformers loads it, and the names that it misses or does not expect."""
    is_seq2seq = transformers.AutoConfig.from_pretrained(folder).model_type == "t5"
    auto = transformers.AutoModelForSeq2SeqLM if is_seq2seq else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
