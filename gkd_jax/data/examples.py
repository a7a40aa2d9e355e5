"""Examples of one split of a task, as text."""

import numpy as np

from gkd_jax.common.array_types import Int
from gkd_jax.data.mixtures import MixedSource
from gkd_jax.data.task import Task, TextExample


class Examples:
    """The examples of one split as text, with random access.

    Args:
      task: the task.
      split: name of a split of the task. The source of the split is opened.
      num_examples: number of examples to use, from the first; None uses all of them.

    Raises:
      FileNotFoundError: a file of the source is missing.
      ValueError: the source is broken or empty, has fewer than `num_examples` examples, or the
        task has no such split.
    """

    def __init__(self, task: Task, split: str, *, num_examples: int | None = None):
        self.task = task
        self.split = split
        self._source = task.source_config(split).open()
        self._num_examples = self._count(num_examples)

    def _count(self, wanted: int | None) -> int:
        available = len(self._source)
        if not available:
            raise ValueError(
                f"Split {self.split!r} of task {self.task.name!r} is an empty data set. "
                "Give its source at least one example."
            )
        if wanted is not None and wanted > available:
            raise ValueError(
                f"DatasetConfig.num_examples is {wanted}, but split {self.split!r} of "
                f"task {self.task.name!r} has {available} examples. Set it to at most "
                f"{available}, or to None to take all."
            )
        return available if wanted is None else wanted

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> TextExample:
        """Returns the text of one example.

        Args:
          index: number of the example in the source.

        Raises:
          ValueError: the raw example lacks a field that the task reads.
        """
        raw_example = self._source[index]
        try:
            return self.task.to_text(raw_example)
        except Exception as error:
            if isinstance(error, KeyError) and error.args[0] not in raw_example:
                raise ValueError(
                    f"Task {self.task.name!r} wants the field {error}, which example {index} of "
                    f"split {self.split!r} lacks: it has {', '.join(map(repr, raw_example))}. "
                    "Correct the source's columns or fields, or the task's to_text."
                ) from error
            error.add_note(f"In task {self.task.name!r}, split {self.split!r}, example {index}.")
            raise

    def check_metrics(self) -> None:
        """Scores the targets of two examples, so that a metric that cannot be computed fails early.

        Raises:
          ValueError: the package of a metric is not installed.
        """
        examples = [self[index] for index in range(min(2, len(self)))]
        references = [list(example.references) for example in examples]
        outputs = [self.task.output_parser(example.targets) for example in examples]
        for metric in self.task.metrics:
            metric(references, outputs)

    @property
    def source_fingerprint(self) -> str:
        """Digest of the content of the source."""
        return self._source.fingerprint

    @property
    def num_sources(self) -> int:
        """Number of sources of a mixture; 1 if the source is not a mixture."""
        return self._source.num_sources if isinstance(self._source, MixedSource) else 1

    def source_id(self, index: int) -> int:
        """Returns the number of an example's source in the mixture; 0 if there is no mixture."""
        return self._source.source_id(index) if isinstance(self._source, MixedSource) else 0

    def sample(self, size: int) -> Int[np.ndarray, " N"]:
        """Returns the numbers of at most `size` examples, evenly spaced over the split."""
        return np.unique(np.linspace(0, len(self) - 1, size).astype(np.int64))
