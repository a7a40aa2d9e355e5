"""Batches from a task: the configuration of a data set, and the opened data set.

`DatasetConfig` names a task, feature lengths and a vocabulary; `Dataset` opens such a
configuration. Texts come from the module `examples`, token ids from `encoding`, and batches from
`batches`; order and exact resumption are implemented in `iterators`.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gkd_jax.common.array_types import Int
from gkd_jax.common.batch import Batch
from gkd_jax.data import packed_rows
from gkd_jax.data.batches import BatchMaker
from gkd_jax.data.chat import ChatTemplate
from gkd_jax.data.content import check_unchanged, content_of
from gkd_jax.data.encoding import Encoder, RowReader
from gkd_jax.data.examples import Examples
from gkd_jax.data.iterators import BatchIterators, TrainIterator
from gkd_jax.data.lengths import check_prompts_differ, report_lengths
from gkd_jax.data.registry import get_task
from gkd_jax.data.task import Task, TextExample
from gkd_jax.data.teacher_store import StoreReader
from gkd_jax.data.vocabularies import Vocabulary

_FEATURES = ("inputs", "targets")
_TEACHER = "teacher_inputs"


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Configuration of a data set: split of a task, order, feature lengths and vocabulary.

    Attributes:
      task: a task, or the name of a registered task (`MIXTURE_OR_TASK_NAME`).
      split: a split of the task.
      feature_lengths: maximum lengths of 'inputs' and 'targets', including the end-of-sequence
        token (`TASK_FEATURE_LENGTHS`). With `teacher_chat`, a length of 'teacher_inputs' may be
        given too.
      batch_size: number of rows of a batch over all processes, with one example per row unless
        `pack` is set.
      vocabulary: converts text to token ids.
      shuffle: whether each training epoch has a new order. Evaluation never shuffles.
      seed: seed of the order.
      num_examples: number of examples to use, from the first of the split; None uses all.
      task_module: module to import first if `task` is a name (`MIXTURE_OR_TASK_MODULE`).
      eos_after_cut_targets: whether an output that was cut because it is too long ends with the
        end-of-sequence token, as in seqio. False omits the token, so that a student is not trained
        to stop in the middle of a sentence.
      inputs_eos: whether prompts end with the end-of-sequence token; None uses the task's setting
        (True for T5). Set it to False for a decoder-only model, which continues its prompt.
      inputs_bos: whether prompts start with the vocabulary's beginning-of-sequence token, which
        decoder-only models such as Llama and Gemma were trained with.
      cut_inputs: the side on which a prompt that is too long is cut: 'right', as in seqio, or
        'left', which keeps the end of a chat prompt: the question and the start of the answer.
      chat: template of a chat model, in which the task's prompt is the user's message; None uses
        the prompt unchanged.
      teacher_chat: the teacher's template, if the teacher was trained with a different one.
      cache_bytes: size limit of the cache of token ids in host memory. Token ids are cached only if
        the token ids of all examples fit.
      read_threads: number of threads that prefetch batches; 0 makes each batch when it is
        requested.
      pack: whether several examples share a row of a training batch, in steps that train on the
        outputs of the data set. `feature_lengths` are then the lengths of the rows. Each example is
        placed in the first row with room for it. A batch ends at the first example that fits in no
        row, so the number of examples varies between batches. Evaluations and the writing of
        teacher stores always have one example per row.
    """

    task: Task | str
    split: str
    feature_lengths: Mapping[str, int]
    batch_size: int
    vocabulary: Vocabulary
    shuffle: bool = True
    seed: int = 0
    num_examples: int | None = None
    task_module: str | None = None
    eos_after_cut_targets: bool = True
    inputs_eos: bool | None = None
    inputs_bos: bool = False
    cut_inputs: str = "right"
    chat: ChatTemplate | None = None
    teacher_chat: ChatTemplate | None = None
    cache_bytes: int = 1 << 28
    read_threads: int = 2
    pack: bool = False

    def __post_init__(self) -> None:
        self._check_lengths()
        if self.batch_size < 1:
            raise ValueError(f"DatasetConfig.batch_size must be at least 1; got {self.batch_size}.")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(
                f"DatasetConfig.seed must be from 0 to 2**32 - 1; got {self.seed}. Set another."
            )
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(
                f"DatasetConfig.num_examples must be at least 1; got {self.num_examples}. Set "
                "it to None to take all examples."
            )
        if self.cut_inputs not in ("left", "right"):
            raise ValueError(
                f"DatasetConfig.cut_inputs must be 'left' or 'right'; got {self.cut_inputs!r}."
            )
        if self.read_threads < 0:
            raise ValueError(
                f"DatasetConfig.read_threads must not be negative; got {self.read_threads}. Set "
                "it to 0 to read without threads."
            )

    def _check_lengths(self) -> None:
        for feature in _FEATURES:
            if feature not in self.feature_lengths:
                raise ValueError(
                    f"DatasetConfig.feature_lengths lacks {feature!r}; got "
                    f"{dict(self.feature_lengths)}. Give the lengths of 'inputs' and 'targets'."
                )
        optional = {_TEACHER} if self.teacher_chat is not None else set()
        unknown = sorted(set(self.feature_lengths) - set(_FEATURES) - optional)
        if unknown:
            raise ValueError(
                f"DatasetConfig.feature_lengths names unknown features {unknown}. Give the "
                "lengths of 'inputs' and 'targets' only, and with teacher_chat of 'teacher_inputs'."
            )
        for feature in _FEATURES:
            length = self.feature_lengths[feature]
            if length < 2:
                raise ValueError(
                    f"DatasetConfig.feature_lengths[{feature!r}] must be at least 2, or nothing "
                    f"but the end of sequence is left of every example; got {length}. Set it to "
                    "the longest text in tokens plus one."
                )

    @property
    def teacher_inputs_length(self) -> int:
        """Maximum length of the teacher's prompt; by default the same as the student's."""
        return self.feature_lengths.get(_TEACHER, self.feature_lengths["inputs"])

    @property
    def batch(self) -> str:
        """Size of a training batch for messages, such as '32 examples'."""
        return f"{self.batch_size} {'packed rows' if self.pack else 'examples'}"

    def build(self) -> "Dataset":
        """Opens and checks the data set."""
        return Dataset(self)


class Dataset:
    """Batches of one split of a task.

    Args:
      config: the configuration.

    Attributes:
      config: the configuration.
      task: the task.
      num_examples: number of examples.

    Raises:
      FileNotFoundError: a file of the source is missing.
      ValueError: the data are broken or empty, the task has no such split, or all prompts are the
        same after cutting.
    """

    def __init__(self, config: DatasetConfig):
        self.config = config
        task = config.task
        self.task = task if isinstance(task, Task) else get_task(task, module=config.task_module)
        self._check_vocabulary()
        self._examples = Examples(self.task, config.split, num_examples=config.num_examples)
        self.num_examples = len(self._examples)
        self._encoder = Encoder(
            config.vocabulary,
            inputs_length=config.feature_lengths["inputs"],
            targets_length=config.feature_lengths["targets"],
            inputs_eos=self.task.inputs_eos if config.inputs_eos is None else config.inputs_eos,
            eos_after_cut_targets=config.eos_after_cut_targets,
            inputs_bos=config.inputs_bos,
            cut_inputs=config.cut_inputs,
        )
        self._rows = self._reader(self._encoder, config.chat)
        lengths = config.feature_lengths
        self._maker = BatchMaker(
            self._rows,
            widths=(lengths["inputs"], lengths["targets"], config.teacher_inputs_length),
            pad_id=config.vocabulary.pad_id,
        )
        self._teacher_vocabulary = config.vocabulary
        if config.teacher_chat is not None:
            length = config.teacher_inputs_length
            encoder = dataclasses.replace(self._encoder, inputs_length=length)
            self._maker.teacher_rows = self._reader(encoder, config.teacher_chat)
            self._maker.teacher_rows.read(np.zeros(1, np.int64))  # Fails if the template is broken.
        self._iterators = BatchIterators(
            self._maker,
            num_examples=self.num_examples,
            batch_size=config.batch_size,
            shuffle_seed=config.seed if config.shuffle else None,
            pack=config.pack,
            threads=config.read_threads,
        )
        check_prompts_differ(self._examples, self._rows, config.vocabulary)

    def _reader(
        self, encoder: Encoder, chat: ChatTemplate | None, *, as_text: bool = False
    ) -> RowReader:
        def read(index: int) -> TextExample:
            example = self.raw(index)
            if as_text:  # An example's token ids are from the student's vocabulary.
                example = dataclasses.replace(example, inputs_ids=None, targets_ids=None)
            if chat is None:
                return example
            messages = [{"role": "user", "content": example.inputs}]
            return dataclasses.replace(example, inputs=chat.render(messages), inputs_ids=None)

        cache_bytes = self.config.cache_bytes
        return RowReader(read, encoder, num_examples=self.num_examples, cache_bytes=cache_bytes)

    def use_stored_teacher(self, path: str) -> None:
        """Adds a teacher's stored distributions to all batches from now on.

        Args:
          path: folder of the store.

        Raises:
          FileNotFoundError: there is no store in this folder.
          ValueError: the store is incomplete, or belongs to other data.
        """
        store = StoreReader(path)
        store.check_data(self.config.vocabulary, self.content)
        self._maker.stored_teacher = store

    @property
    def stored_teacher(self) -> StoreReader | None:
        """The store that was passed to `use_stored_teacher`, if any."""
        return self._maker.stored_teacher

    def use_teacher_vocabulary(
        self,
        vocabulary: Vocabulary,
        *,
        inputs_length: int | None,
        inputs_eos: bool | None,
        inputs_bos: bool,
    ) -> None:
        """Adds the prompts, encoded with the teacher's vocabulary, to all batches from now on.

        Args:
          vocabulary: the teacher's vocabulary.
          inputs_length: maximum length of a prompt; None uses
            `DatasetConfig.teacher_inputs_length`.
          inputs_eos: whether prompts end with the end-of-sequence token; None uses the student's
            setting.
          inputs_bos: whether prompts start with the beginning-of-sequence token.

        Raises:
          ValueError: `inputs_bos` is set and the vocabulary has no such token.
        """
        if inputs_bos and vocabulary.bos_id is None:
            raise ValueError(
                "CrossTokenizerTeacher.inputs_bos begins prompts with the vocabulary's beginning "
                f"of sequence; got {vocabulary.name}, which has none. Set it to False."
            )
        encoder = dataclasses.replace(
            self._encoder,
            vocabulary=vocabulary,
            inputs_length=inputs_length or self.config.teacher_inputs_length,
            inputs_eos=self._encoder.inputs_eos if inputs_eos is None else inputs_eos,
            inputs_bos=inputs_bos,
        )
        self._maker.teacher_rows = self._reader(encoder, self.config.teacher_chat, as_text=True)
        self._teacher_vocabulary = vocabulary

    def use_source_ids(self, num_sources: int) -> None:
        """Adds `source_id`, the source of each example in a mixture, to all batches from now on.

        Args:
          num_sources: number of sources that the mixture is expected to have.

        Raises:
          ValueError: the data are not a mixture of `num_sources` sources.
        """
        found = self._examples.num_sources
        if found != num_sources:
            raise ValueError(
                f"RoutedTeachers.routes names a teacher for each of {num_sources} sources of a "
                f"mixture; got {found} in split {self.config.split!r} of task {self.task.name!r}. "
                "Give as many routes as Mixture.sources of the training's and the evaluation's "
                "data has."
            )
        self._maker.source_id = self._examples.source_id

    def _check_vocabulary(self) -> None:
        if self.config.inputs_bos and self.config.vocabulary.bos_id is None:
            raise ValueError(
                "DatasetConfig.inputs_bos begins prompts with the vocabulary's beginning of "
                f"sequence; got {self.config.vocabulary.name}, which has none. Set it to False."
            )
        wanted = self.task.vocabulary_fingerprint
        if wanted is not None and wanted != self.config.vocabulary.fingerprint:
            raise ValueError(
                f"DatasetConfig.vocabulary must be the one that made the tokens of task "
                f"{self.task.name!r}; got {self.config.vocabulary.name}, whose ids mean other "
                "pieces. For a seqio task take gkd_jax.data.seqio_adapter.seqio_vocabulary."
            )

    def raw(self, index: int) -> TextExample:
        """Returns the text of the example with a given number in the source.

        Raises:
          ValueError: the raw example lacks a field that the task reads.
        """
        return self._examples[index]

    def check_metrics(self) -> None:
        """Checks that the task's metrics can be computed; see `Examples.check_metrics`."""
        self._examples.check_metrics()

    def source_index(self, position: int) -> int:
        """Maps a position in the training order to the number of the example in the source."""
        return self._iterators.example_at(position)

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """Describes everything that determines the rows of the examples, except their order."""
        return content_of(
            self._examples,
            self._encoder,
            chat=self.config.chat,
            teacher_chat=self.config.teacher_chat,
        )

    @property
    def fingerprint(self) -> str:
        """JSON with everything that determines the row at each position of the training order.

        The batch size is not included.
        """
        fields = self.content | {
            "shuffle": self.config.shuffle,
            "seed": self.config.seed,
            "order": [self.source_index(position) for position in range(8)],
        }
        if self.stored_teacher is not None:
            fields["stored_teacher"] = self.stored_teacher.fingerprint
        return json.dumps(fields, sort_keys=True)

    def check_fingerprint(self, saved: str) -> None:
        """Refuses to resume from a position that was saved for other data.

        Args:
          saved: `fingerprint` of the data that the position was saved for.

        Raises:
          ValueError: the data differ; the message names the differences.
        """
        check_unchanged(saved, self.fingerprint)

    def train_iterator(
        self, position: int = 0, *, process_index: int = 0, process_count: int = 1
    ) -> TrainIterator:
        """Returns an endless iterator over the rows of this process.

        Args:
          position: number of examples that all processes together have consumed before. Pass a
            saved `TrainIterator.position` to continue an interrupted run exactly.
          process_index: index of this process.
          process_count: number of processes.

        Raises:
          ValueError: `batch_size` is not divisible by the number of processes, or `position` is
            negative.
        """
        return self._iterators.train(
            position, process_index=process_index, process_count=process_count
        )

    @property
    def packing(self) -> packed_rows.PackingStatistics:
        """Statistics of the packed training rows, measured on the first examples."""
        return self._iterators.packing

    @property
    def examples_per_batch(self) -> float:
        """Number of examples of a training batch; an estimate if rows are packed."""
        batch_size = self.config.batch_size
        return self.packing.examples_per_row * batch_size if self.config.pack else batch_size

    def eval_batches(
        self, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[Batch, Int[np.ndarray, " B"]]]:
        """Iterates over all examples once, in the order of the source, divided among the processes.

        All processes yield the same number of batches. The last batch is completed by filler rows
        with weights 0 and a prompt of one token.

        Args:
          process_index: index of this process.
          process_count: number of processes.

        Returns:
          An iterator over pairs (batch, numbers). For each row of the batch, `numbers` has the
          number of its example in the source, or -1 for a filler row. `example_id` has the same
          values.
        """
        return self._iterators.one_pass(process_index=process_index, process_count=process_count)

    def describe(self) -> str:
        """Reports lengths and truncation over a sample of the examples, and shows one example."""
        first = np.zeros(1, np.int64)
        rows = self._rows.read(first)
        lines = [
            f"task {self.task.name!r}, split {self.config.split!r}: {self.num_examples} examples, "
            f"batches of {self.config.batch}, {self.config.vocabulary.name}",
            *report_lengths(self._examples, self._rows),
        ]
        if self.config.pack:
            lines.append(f"  packed: {self.packing}")
        for feature, ids in (("inputs", rows.inputs[0]), ("targets", rows.targets[0])):
            lines.append(f"  {feature}[0]: {self.config.vocabulary.decode(ids.tolist())!r}")
        if self._maker.teacher_rows is not None:
            ids = self._maker.teacher_rows.read(first).inputs[0]
            decoded = self._teacher_vocabulary.decode(ids.tolist())
            lines.append(f"  teacher_inputs[0]: {decoded!r}")
        return "\n".join(lines)
