"""Runs steps of Tunix's DistillationTrainer on request, for `benchmarks/run.py --peers`.

Tunix distils with a forward KL on fixed texts. For GKD this script adds a strategy with a JSD on
the logits of the outputs alone, and a data set whose batches Tunix's sampler draws from the current
student.
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from flax import nnx
from tunix.distillation import distillation_trainer
from tunix.distillation.strategies import base_strategy
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama3
from work import Llama, Sizes, parse_peer_arguments, word


class Words:
    """A vocabulary with one word per token, with the methods that the sampler calls."""

    def encode(self, text: str) -> list[int]:
        return [int(part.removeprefix(word(0)[:-1])) for part in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(word, tokens))

    def pad_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 0  # The sampler treats 0 as no token.

    def eos_id(self) -> int:
        return 1


class JSDStrategy(base_strategy.BaseStrategy):
    """Mean generalized JSD over all output tokens."""

    def __init__(self, sizes: Sizes):
        def forward(model: Any, input_tokens: Any, **inputs: Any) -> Any:
            logits, _ = model(input_tokens, cache=None, **inputs)
            return logits[:, sizes.prompt - 1 : -1]

        def labels(input_tokens: Any, **inputs: Any) -> Any:
            return input_tokens[:, sizes.prompt :]

        super().__init__(forward, forward, labels)
        self.beta = sizes.beta

    def compute_loss(self, student_output: Any, teacher_output: Any, labels: Any) -> Any:
        beta = self.beta
        student, teacher = jax.nn.log_softmax(student_output), jax.nn.log_softmax(teacher_output)
        mixture = jnp.logaddexp(teacher + np.log(beta), student + np.log1p(-beta))
        of_teacher = jnp.sum(jnp.exp(teacher) * (teacher - mixture), axis=-1)
        of_student = jnp.sum(jnp.exp(student) * (student - mixture), axis=-1)
        return jnp.mean(beta * of_teacher + (1 - beta) * of_student)

    def compute_eval_loss(self, student_output: Any, labels: Any) -> Any:
        raise NotImplementedError("Nothing is evaluated here.")


def make_model(sizes: Sizes, llama: Llama, seed: int) -> llama3.Llama3:
    """Builds a Llama with random float32 weights. Tunix's zero MLPs take the same time."""
    config = llama3.ModelConfig(
        num_layers=sizes.num_layers,
        vocab_size=sizes.vocab_size,
        embed_dim=llama.dim,
        hidden_dim=llama.mlp_dim,
        num_heads=llama.num_heads,
        head_dim=llama.dim // llama.num_heads,
        num_kv_heads=llama.num_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    return llama3.Llama3(config, rngs=nnx.Rngs(seed))


def batches(sizes: Sizes, student: llama3.Llama3, *, on_policy: bool) -> Iterator[Any]:
    """Yields one batch per step. A step's time is from one request for a batch to the next."""
    llama = sizes.student
    length = sizes.prompt + sizes.output
    config = CacheConfig(length, sizes.num_layers, llama.num_heads, llama.dim // llama.num_heads)
    sampler = Sampler(student, Words(), config)
    prompts, outputs = np.array(sizes.prompts()), np.array(sizes.outputs())
    texts = [" ".join(map(word, prompt)) for prompt in sizes.prompts()]
    steps = timing.StepsOnRequest()
    step = 0
    while steps.wait():
        if on_policy:
            sampler.transformer_state = nnx.variables(student, nnx.Param)
            sampled = sampler(
                texts,
                max_generation_steps=sizes.output,
                max_prompt_length=sizes.prompt,
                temperature=1.0,
                top_p=1.0,
                seed=step,
                eos_tokens=[sizes.vocab_size],  # No such token: no output ends early.
                pad_output=True,
            )
            outputs = np.asarray(sampled.tokens)[:, : sizes.output]
        tokens = np.concatenate([prompts, outputs], axis=1).astype(np.int32)
        yield distillation_trainer.TrainingInput(
            input_tokens=jnp.asarray(tokens), input_mask=jnp.ones(tokens.shape, bool)
        )
        jax.block_until_ready(nnx.state(student))
        steps.answer()
        step += 1
    sys.exit(0)


def main() -> None:
    """Trains until no more steps are requested."""
    sizes, on_policy = parse_peer_arguments()
    student = make_model(sizes, sizes.student, 0)
    length = sizes.prompt + sizes.output
    causal = jnp.tril(jnp.ones((length, length), bool))[None]

    def model_inputs(batch: Any) -> dict[str, Any]:
        shape = batch.input_tokens.shape
        return {
            "input_tokens": batch.input_tokens,
            "positions": jnp.broadcast_to(jnp.arange(length), shape),
            "attention_mask": jnp.broadcast_to(causal, (shape[0], length, length)),
        }

    trainer = distillation_trainer.DistillationTrainer(
        student,
        make_model(sizes, sizes.teacher, 1),
        JSDStrategy(sizes),
        optax.adamw(sizes.learning_rate, weight_decay=0.0),
        distillation_trainer.TrainingConfig(eval_every_n_steps=1_000_000, max_steps=1_000_000),
    ).with_gen_model_input_fn(model_inputs)
    trainer.train(batches(sizes, student, on_policy=on_policy))


if __name__ == "__main__":
    main()
