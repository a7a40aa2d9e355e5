"""Tasks: sources of raw examples, the text made of them, and the metrics of generated outputs.

A source gives raw examples (from a file, TFDS, memory or a generator). A task turns a raw example
into text. Token ids, lengths, order and batches are made by the pipeline, in the same way for all
tasks.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from gkd_jax.common.moved import load_moved

RawExample: TypeAlias = Mapping[str, Any]
"""Maps each field name to its value in the source, usually a str or a list of str."""

MetricFn: TypeAlias = Callable[[list[list[str]], list[str]], Mapping[str, Any]]
"""Function of (references of each example, predictions) that returns a `data.metrics.score.Score`
for each metric name."""


class Source(Protocol):
    """Raw examples with random access. Can be read from several threads."""

    @property
    def fingerprint(self) -> str:
        """Digest of the content: sources of different content have different fingerprints."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RawExample: ...


class SourceConfig(Protocol):
    """A frozen dataclass that names examples without reading them.

    A source that costs nothing to open may be its own configuration: `open` then returns `self`.
    """

    def open(self) -> Source:
        """Finds and checks the examples.

        Raises:
          FileNotFoundError: a file does not exist.
          ValueError: the content is empty or broken; the message names the place and the remedy.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class TextExample:
    """One example as text.

    Attributes:
      inputs: the whole prompt, including prefix and exemplars.
      targets: the output to learn.
      references: texts with which metrics compare a prediction, in the form that the task's
        `output_parser` returns (for example only the final number); defaults to `(targets,)`.
      inputs_ids: token ids of `inputs`, from a source that is already tokenized (a seqio task).
        They are used instead of encoding the text. They may end with the end-of-sequence token or
        not: the batch contains this token exactly once in both cases.
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


def unchanged(output: str) -> str:
    """Returns the output unchanged. The default output parser."""
    return output


@dataclasses.dataclass(frozen=True)
class Task:
    """A text-to-text task.

    Examples:
      >>> from gkd_jax import data
      >>> from gkd_jax.data import metrics
      >>> source = data.InMemory([{"article": "Rain closed the road.", "headline": "Road closed"}])
      >>> task = data.Task(
      ...     name="headlines",
      ...     sources={"train": source},
      ...     to_text=data.FieldsToText("article", "headline", prefix="headline: "),
      ...     metrics=(metrics.exact_match,),
      ... )
      >>> example = task.to_text(task.source_config("train").open()[0])
      >>> example.inputs
      'headline: Rain closed the road.'
      >>> example.targets
      'Road closed'
      >>> score = task.metrics[0]([list(example.references)], ["Road  closed"])["exact_match"]
      >>> print(score)
      100.00 ± 0.00

    Attributes:
      name: name of the task in logs and gin files (`MIXTURE_OR_TASK_NAME`).
      sources: maps each split ('train', 'validation', 'test') to its source.
      to_text: makes the prompt (with prefix, exemplars or template) and the output of a raw
        example. Must be a pure function: it is called in every epoch and from several threads.
        `FieldsToText` reads both from fields of the example.
      metrics: functions of (references, parsed predictions).
      output_parser: function that is applied to each decoded prediction before the metrics are
        computed. The references that `to_text` returns must be parsed already.
      inputs_eos: whether the prompt ends with the end-of-sequence token, as in T5.
      vocabulary_fingerprint: fingerprint of the vocabulary with which the sources were tokenized,
        if they contain token ids. A `DatasetConfig` with another vocabulary is then an error.
    """

    name: str
    sources: Mapping[str, SourceConfig]
    to_text: Callable[[RawExample], TextExample]
    metrics: tuple[MetricFn, ...] = ()
    output_parser: Callable[[str], str] = unchanged
    inputs_eos: bool = True
    vocabulary_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("Task.name must not be empty. Set it to the task's name.")
        if not isinstance(self.sources, Mapping):
            raise ValueError(
                f"Task.sources of task {self.name!r} must map names of splits to sources; got "
                f"{self.sources!r}. Write a single source as {{'train': source}}."
            )
        if not self.sources:
            raise ValueError(
                f"Task.sources of task {self.name!r} is empty. Give at least one split, "
                "e.g. {'train': JsonLines('train.jsonl')}."
            )
        if callable(self.metrics) or not all(callable(metric) for metric in self.metrics):
            raise ValueError(
                f"Task.metrics of task {self.name!r} must be a tuple of functions; got "
                f"{self.metrics!r}. Write a single metric as (metric,), with its comma."
            )
        object.__setattr__(self, "metrics", tuple(self.metrics))

    def source_config(self, split: str) -> SourceConfig:
        """Returns the source of a split.

        Raises:
          ValueError: the task has no such split; the message names its splits.
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
      ValueError: the module does not exist.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # The module exists, but one of its own imports does not.
        raise ValueError(
            f"MIXTURE_OR_TASK_MODULE {module!r} cannot be imported: {error}. Give a module's "
            "dotted name and put its folder on PYTHONPATH."
        ) from error


def __getattr__(name: str) -> Any:
    """Returns a name that this module defined in earlier versions."""
    return load_moved(__name__, name)
