"""A teacher with another vocabulary: it reads outputs in its own tokens, compared on spans."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gkd_jax.array_types import Array, Metrics
from gkd_jax.batch import Batch, TeacherTokens
from gkd_jax.data.common_text import CommonText, Table, common_text
from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.experiment import Experiment
from gkd_jax.objectives.objective import Objective
from gkd_jax.objectives.spans import Classes, SpanObjective, Vocabularies, span_metrics
from gkd_jax.partitioning import Partitioner


def measured_objective(experiment: Experiment, vocabulary: Vocabulary) -> Objective:
    """The objective as a step measures it: on spans, where the teacher has its own tokens.

    Args:
      experiment: whose objective it is.
      vocabulary: the student's.

    Raises:
      ValueError: the two vocabularies cannot be compared, or the objective not on spans.
    """
    objective = experiment.objective
    common = _common(experiment, vocabulary)
    if common is None:
        return objective
    names = [field.name for field in dataclasses.fields(Objective)]
    settings: dict[str, Any] = {name: getattr(objective, name) for name in names}
    return SpanObjective(**settings, vocabularies=_vocabularies(common))


def make_reader(experiment: Experiment, vocabulary: Vocabulary) -> "TeacherReader | None":
    """What has the teacher read a batch's outputs; None where it has the student's tokens."""
    common = _common(experiment, vocabulary)
    if common is None:
        return None
    assert experiment.teacher is not None
    own = experiment.teacher.own_tokens
    assert own is not None
    return TeacherReader(common, experiment.partitioner, targets_length=own.targets_length)


class TeacherReader:
    """Gives batches the teacher's tokens of their outputs, sampled or not.

    It works on texts, on the host, and so waits for a rollout to end. Each process reads its own
    rows.
    """

    def __init__(
        self, common: CommonText, partitioner: Partitioner, *, targets_length: int | None = None
    ):
        """Keeps what it needs.

        Args:
          common: both vocabularies.
          partitioner: rows lie on the devices as those of a batch do.
          targets_length: longest output in the teacher's tokens; None as many as the student's.
        """
        self._common = common
        self._partitioner = partitioner
        self._targets_length = targets_length

    def __call__(self, batch: Batch) -> tuple[Batch, Metrics]:
        """The batch with `teacher_tokens`, and how well the tokens agree."""
        rows, weights = self._partitioner.local_rows((batch.targets, batch.loss_weights))
        tokens = self._partitioner.shard_batch(self.read(rows, weights))
        return (
            dataclasses.replace(batch, teacher_tokens=tokens),
            _jit_metrics()(tokens, batch.loss_weights),
        )

    def read(self, targets: np.ndarray, loss_weights: np.ndarray) -> TeacherTokens:
        """The teacher's tokens of some rows, in the host's memory."""
        num_rows, length = targets.shape
        width = self._targets_length or length
        shapes = {"spans": length, "labels": length, "teacher_spans": width}
        arrays = {name: np.zeros((num_rows, size), np.int32) for name, size in shapes.items()}
        ids = np.full((num_rows, width), self._common.teacher.pad_id, np.int32)
        kept = np.zeros((num_rows, width), np.float32)
        for row in range(num_rows):
            end = int(np.count_nonzero(loss_weights[row]))
            found = self._common.align(targets[row, :end].tolist())
            size = min(width, len(found.teacher_ids))
            ids[row, :size] = found.teacher_ids[:size]
            kept[row, :size] = 1.0
            # A span that does not fit is none, nor are those behind it.
            cut = found.teacher_spans[width:]
            last = min((one for one in cut if one), default=len(found.texts) + 1)
            spans = np.array(found.spans, np.int32)
            teacher_spans = np.array(found.teacher_spans[:size], np.int32)
            arrays["spans"][row, :end] = np.where(spans < last, spans, 0)
            arrays["teacher_spans"][row, :size] = np.where(teacher_spans < last, teacher_spans, 0)
            labels = np.array([0, *self._labels(found.texts, found.teacher_spans)], np.int32)
            arrays["labels"][row, :end] = labels[spans]
        fields: dict[str, Any] = {"targets": ids, "loss_weights": kept, **arrays}
        return TeacherTokens(**fields)

    def _labels(self, texts: list[bytes | None], teacher_spans: list[int]) -> list[int]:
        common = self._common
        labels = []
        for number, text in enumerate(texts, start=1):
            is_first = teacher_spans[0] == number
            table = common.first if is_first else common.table
            found, is_whole = common.class_of(text, is_first=is_first)
            if found == len(table.numbers):
                found = common.num_classes
            elif not is_whole and found != table.rest:
                found = common.num_classes + 1
            labels.append(found)
        return labels


def _common(experiment: Experiment, vocabulary: Vocabulary) -> CommonText | None:
    teacher, model = experiment.teacher, experiment.teacher_model
    if teacher is None or model is None or not experiment.objective.divergence.needs_teacher:
        return None
    own = teacher.own_tokens
    if own is None:
        return None
    sizes = (experiment.student.model.vocab_size, model.vocab_size)
    # Vocabularies are frozen dataclasses.
    both: Any = (vocabulary, own.vocabulary)
    return common_text(*both, sizes)


@functools.lru_cache(maxsize=8)
def _vocabularies(common: CommonText) -> Vocabularies:
    """The same object for the same vocabularies: what was compiled serves again."""

    def both(table: Table) -> tuple[Classes, Classes]:
        rest = len(table.numbers)
        student, teacher = (
            Classes(np.where(one == rest, common.num_classes, one), common.num_classes)
            for one in (table.student, table.teacher)
        )
        return student, teacher

    first = None if common.first is common.table else both(common.first)
    return Vocabularies(*both(common.table), first)


@functools.cache
def _jit_metrics() -> Callable[[TeacherTokens, Array], Metrics]:
    return jax.jit(span_metrics)
