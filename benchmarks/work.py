"""Sizes of the training step that gkd_jax, TRL and Tunix are compared on. Imports no library."""

import argparse
import dataclasses
import random


@dataclasses.dataclass(frozen=True)
class Llama:
    """Sizes of a decoder-only model with gated MLPs and tied embeddings."""

    dim: int
    num_heads: int
    mlp_dim: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Batch size, lengths and models of one step. All outputs have the full length.

    As Llamas, the student has 4,949,120 parameters and the teacher 19,369,344.
    """

    batch_size: int = 8
    prompt: int = 64
    output: int = 64
    vocab_size: int = 32_000
    num_layers: int = 4
    student: Llama = Llama(dim=128, num_heads=4, mlp_dim=384)
    teacher: Llama = Llama(dim=384, num_heads=6, mlp_dim=1024)
    learning_rate: float = 1e-4
    beta: float = 0.5

    def prompts(self) -> list[list[int]]:
        """Returns random prompts. Ids 0, 1 and 2 (padding, end, unknown) do not occur."""
        generator = random.Random(0)
        return [self._tokens(generator, self.prompt) for _ in range(self.batch_size)]

    def outputs(self) -> list[list[int]]:
        """Returns random outputs, for lambda = 0."""
        generator = random.Random(1)
        return [self._tokens(generator, self.output) for _ in range(self.batch_size)]

    def _tokens(self, generator: random.Random, length: int) -> list[int]:
        return [generator.randrange(3, self.vocab_size) for _ in range(length)]


SMALLEST = Sizes(batch_size=2, prompt=4, output=4, vocab_size=64, num_layers=1)
"""Tiny sizes, for tests of the scripts."""


def word(token: int) -> str:
    """Returns the word for a token, for libraries that take text."""
    return f"w{token}"


def parse_peer_arguments() -> tuple[Sizes, bool]:
    """Returns the sizes, and whether outputs are sampled from the student (lambda = 1 or 0)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", choices=("data", "on_policy"), required=True)
    parser.add_argument("--smallest", action="store_true")
    args = parser.parse_args()
    return SMALLEST if args.smallest else Sizes(), args.serve == "on_policy"
