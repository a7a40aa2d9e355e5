"""Random Llamas, a tokenizer, arguments and a timer, shared by both TRL trainers."""

import sys
import tempfile
from typing import Any

import timing
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from work import Llama, Sizes, word


def make_model(sizes: Sizes, llama: Llama) -> transformers.LlamaForCausalLM:
    """Builds a Llama with random float32 weights, whose outputs do not end early."""
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=llama.dim,
        intermediate_size=llama.mlp_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=llama.num_heads,
        num_key_value_heads=llama.num_heads,
        max_position_embeddings=sizes.prompt + sizes.output,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    model.generation_config.eos_token_id = None
    return model


def make_tokenizer(sizes: Sizes) -> transformers.PreTrainedTokenizerFast:
    """Builds a tokenizer with one word per token."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocabulary |= {word(token): token for token in range(3, sizes.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def arguments(sizes: Sizes) -> dict[str, Any]:
    """Returns arguments for any trainer: float32 on a CPU, no recomputation, saves or logs."""
    return dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=sizes.batch_size,
        learning_rate=sizes.learning_rate,
        max_steps=1_000_000,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        temperature=1.0,
        beta=sizes.beta,
    )


class StepTimes(transformers.TrainerCallback):
    """Runs a step only on request, and reports its time."""

    def __init__(self) -> None:
        self._steps = timing.StepsOnRequest()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._steps.wait():
            sys.exit(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.answer()
