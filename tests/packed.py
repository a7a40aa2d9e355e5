"""Examples in rows of their own, and the same ones packed by hand."""

import dataclasses

import jax
import numpy as np

from gkd_jax.common.batch import Batch

PAD = 0
# Prompt and output lengths: one of each is a single token.
LENGTHS = ((7, 4), (1, 6), (5, 1), (9, 7), (3, 5), (6, 2))
# Which examples each row holds, and one row that is full to its last place.
ROWS = ((0, 1, 2), (3, 4), (5,))
WIDTHS = (13, 12)


@dataclasses.dataclass(frozen=True)
class Both:
    """A batch of examples in rows of their own, and the same packed."""

    alone: Batch
    packed: Batch

    def spread(self, per_token: np.ndarray) -> np.ndarray:
        """Values of the packed batch's positions [B, T, ...] as those of the other's."""
        per_token = np.asarray(per_token)
        out = np.zeros((*self.alone.targets.shape, *per_token.shape[2:]), per_token.dtype)
        for row, examples in enumerate(ROWS):
            start = 0
            for example in examples:
                length = LENGTHS[example][1]
                out[example, :length] = per_token[row, start : start + length]
                start += length
        return out


def make(vocab_size: int = 96, seed: int = 0, *, changed: int | None = None) -> Both:
    """Random examples; `changed` names one of which all tokens differ from those of no change."""
    generator = np.random.default_rng(seed)
    examples = []
    for number, lengths in enumerate(LENGTHS):
        tokens = [generator.integers(3, vocab_size, length) for length in lengths]
        if number == changed:
            tokens = [3 + (part - 3 + 7) % (vocab_size - 3) for part in tokens]
        examples.append(tokens)
    alone = [[number] for number in range(len(LENGTHS))]
    unpacked = _rows(examples, alone, (9, 7))
    unpacked = dataclasses.replace(unpacked, inputs_segments=None, targets_segments=None)
    return Both(unpacked, _rows(examples, ROWS, WIDTHS))


def _rows(examples, rows, widths) -> Batch:
    tokens = [np.full((len(rows), width), PAD, np.int32) for width in widths]
    segments = [np.zeros((len(rows), width), np.int32) for width in widths]
    for row, numbers in enumerate(rows):
        for part in range(2):
            joined = np.concatenate([examples[number][part] for number in numbers])
            counts = [len(examples[number][part]) for number in numbers]
            tokens[part][row, : len(joined)] = joined
            segments[part][row, : len(joined)] = np.repeat(1 + np.arange(len(numbers)), counts)
    return Batch(
        inputs=tokens[0],
        inputs_mask=segments[0] > 0,
        targets=tokens[1],
        loss_weights=(segments[1] > 0).astype(np.float32),
        example_id=np.array([numbers[0] for numbers in rows], np.int32),
        inputs_segments=segments[0],
        targets_segments=segments[1],
    )


def random_params(model, seed: int = 7):
    """Far enough from 0 for every token to matter; by NumPy, so that nothing is compiled."""
    generator = np.random.default_rng(seed)

    def one(leaf):
        scale = min(leaf.shape) ** -0.5 if leaf.ndim > 1 else 0.2
        return generator.normal(1.0 if leaf.ndim == 1 else 0.0, scale, leaf.shape).astype(
            np.float32
        )

    return jax.tree.map(one, model.abstract_params())
