"""A seqio task for trying GKD in T5X's trainer: reversing rows of numbers, without a download.

gin_configs/t5x/tiny.gin imports it. Run T5X from the folder that contains `examples`.
"""

import functools

import numpy as np
import seqio
import tensorflow as tf

NAME = "t5x_reverse"
VOCAB_SIZE = 96
MAX_LENGTH = 9
NUM_EXAMPLES = {"train": 4096, "validation": 128}
_SEEDS = {"train": 0, "validation": 1}


def vocabulary() -> seqio.Vocabulary:
    """Returns a vocabulary whose tokens are the numbers: 0 is padding, 1 the end, 2 to 95 data."""
    return seqio.PassThroughVocabulary(VOCAB_SIZE, eos_id=1)


def _dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    generator = np.random.default_rng(_SEEDS[split])
    rows = []
    for _ in range(NUM_EXAMPLES[split]):
        length = generator.integers(3, MAX_LENGTH + 1)
        row = np.zeros(MAX_LENGTH, np.int32)
        row[:length] = generator.integers(2, VOCAB_SIZE, length)
        rows.append(row)
    return tf.data.Dataset.from_tensor_slices(np.stack(rows))


def _to_features(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def features(row: tf.Tensor) -> dict[str, tf.Tensor]:
        numbers = tf.boolean_mask(row, row > 0)
        return {"inputs": numbers, "targets": tf.reverse(numbers, axis=[0])}

    return dataset.map(features)


@functools.cache
def register() -> None:
    """Registers the task with seqio."""
    feature = seqio.Feature(vocabulary(), add_eos=True, dtype=tf.int32)
    seqio.TaskRegistry.add(
        NAME,
        source=seqio.FunctionDataSource(_dataset, splits=("train", "validation")),
        preprocessors=[_to_features, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[exact_rows],
    )


def exact_rows(targets: list, predictions: list) -> dict[str, float]:
    """Computes the percentage of rows that are reversed without an error."""
    same = [list(t) == list(p)[: len(t)] for t, p in zip(targets, predictions, strict=True)]
    return {"exact_rows": 100.0 * sum(same) / len(same)}


register()
