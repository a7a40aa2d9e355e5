"""What is learnt: a task joins sources of raw examples, their text, and its metrics.

A source is where raw examples come from (a file, TFDS, memory, a generator). A task turns a raw
example into text. Tokens, lengths, order and batches are the pipeline's, the same for all tasks.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from gkd_jax.common.moved import load_moved

RawExample: TypeAlias = Mapping[str, Any]
"""Field name to a str or a list of str, as the source holds them."""

MetricFn: TypeAlias = Callable[[list[list[str]], list[str]], Mapping[str, Any]]
"""(references of each example, predictions) -> metric name to `data.metrics.score.Score`."""


class Source(Protocol):
    """Raw examples in random access. Safe to read from several threads."""

    @property
    def fingerprint(self) -> str:
        """Digest bound to the content: another content has another fingerprint."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RawExample: ...


class SourceConfig(Protocol):
    """A frozen dataclass that says where examples are, without touching them.

    What costs nothing to open may be its own source: its `open` returns itself.
    """

    def open(self) -> Source:
        """Finds and checks the examples.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the content is empty or broken; says where, and the remedy.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class TextExample:
    """One example as text.

    Attributes:
      inputs: the whole prompt, prefix and exemplars included.
      targets: the output to learn.
      references: what metrics compare a prediction with, in the form that the task's
        `output_parser` gives (e.g. only the final number); `(targets,)` where none is given.
      inputs_ids: token ids of `inputs`, from a source that holds tokens already (a seqio task):
        they are used as they are and not made again from text. Their final end-of-sequence
        token may be there or not; it is in the batch exactly once either way.
      targets_ids: the same for `targets`.
    """

    inputs: str
    targets: str
    references: tuple[str, ...] = ()
    inputs_ids: tuple[int, ...] | None = None
    targets_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", (self.targets,))


def as_it_is(output: str) -> str:
    """The output parser of tasks that need none."""
    return output


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of text to text.

    Attributes:
      name: how logs and gin files (`MIXTURE_OR_TASK_NAME`) call it.
      sources: split name ('train', 'validation', 'test') to where its examples are.
      to_text: makes the prompt (with prefix, exemplars or template) and the output of a raw
        example. Must be a pure function: it is called again each epoch, from several threads.
      metrics: functions of (references, parsed predictions).
      output_parser: applied to each decoded prediction before the metrics; `to_text` gives
        references that are in this form already.
      inputs_eos: whether the prompt ends with the end-of-sequence token (T5: it does).
      vocabulary_fingerprint: of the vocabulary that made the tokens, where the sources hold
        tokens; a `DatasetConfig` with another vocabulary is then refused.
    """

    name: str
    sources: Mapping[str, SourceConfig]
    to_text: Callable[[RawExample], TextExample]
    metrics: tuple[MetricFn, ...] = ()
    output_parser: Callable[[str], str] = as_it_is
    inputs_eos: bool = True
    vocabulary_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("Task.name must not be empty. Set it to the task's name.")
        if not self.sources:
            raise ValueError(
                f"Task.sources of task {self.name!r} is empty. Give at least one split, "
                "e.g. {'train': JsonLines('train.jsonl')}."
            )

    def source_config(self, split: str) -> SourceConfig:
        """The source of a split.

        Raises:
          ValueError: the task has no such split; names those it has.
        """
        if split not in self.sources:
            raise ValueError(
                f"split {split!r} is not known to task {self.name!r}, which has "
                f"{', '.join(map(repr, self.sources))}. Set DatasetConfig.split to one of these "
                "or add it to Task.sources."
            )
        return self.sources[split]


def import_task_module(module: str) -> None:
    """Imports the module that registers a user's tasks.

    Raises:
      ValueError: there is no such module.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # The module is there; something that it imports is not.
        raise ValueError(
            f"MIXTURE_OR_TASK_MODULE {module!r} cannot be imported: {error}. Give a module's "
            "dotted name and put its folder on PYTHONPATH."
        ) from error


def __getattr__(name: str) -> Any:
    """What this module used to define."""
    return load_moved(__name__, name)
