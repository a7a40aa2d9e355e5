"""Report of the lengths of examples in tokens, and a check of the prompts after truncation."""

import numpy as np

from gkd_jax.data.encoding import RowReader
from gkd_jax.data.examples import Examples
from gkd_jax.data.vocabularies import Vocabulary

_REPORTED_EXAMPLES = 1000
_CHECKED_EXAMPLES = 32


def check_prompts_differ(examples: Examples, rows: RowReader, vocabulary: Vocabulary) -> None:
    """Checks that truncation does not make all prompts of a sample the same.

    Args:
      examples: texts of the examples.
      rows: reads the token ids of the examples.
      vocabulary: vocabulary of the token ids.

    Raises:
      ValueError: the prompts are cut so short that all of them are the same.
    """
    sample = examples.sample(_CHECKED_EXAMPLES)
    read = rows.read(sample)
    length, full_lengths = read.inputs.shape[1], read.full_lengths[:, 0]
    all_same = bool((read.inputs == read.inputs[0]).all())
    all_cut = bool((full_lengths > length).all())
    if all_same and all_cut and len({examples[int(number)].inputs for number in sample}) > 1:
        text = vocabulary.decode(read.inputs[0].tolist())
        raise ValueError(
            f"DatasetConfig.feature_lengths['inputs'] = {length} cuts "
            f"every prompt of task {examples.task.name!r} to the same text, {text!r}: the "
            f"shortest of a sample has {full_lengths.min()} tokens. Set it higher."
        )


def report_lengths(examples: Examples, rows: RowReader) -> list[str]:
    """Reports lengths and truncation in a sample: one line for prompts and one for outputs."""
    sample = examples.sample(_REPORTED_EXAMPLES)
    read = rows.read(sample)
    lines = []
    for column, (feature, array) in enumerate((("inputs", read.inputs), ("targets", read.targets))):
        full, length = read.full_lengths[:, column], array.shape[1]
        half, most, longest = np.percentile(full, (50, 95, 100)).astype(int)
        lines.append(
            f"  {feature}: {half} tokens (median), {most} (95%), {longest} (longest of "
            f"{len(sample)}); {np.mean(full > length):.1%} are cut to {length}"
        )
    return lines
