"""Retokenization of outputs for a teacher whose tokenizer differs from the student's.

Predictions of student and teacher are compared on spans of text, see `data.common_text`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gkd_jax.common.array_types import Array, Float, Int, Metrics
from gkd_jax.common.batch import Batch, TeacherTokens
from gkd_jax.data.common_text import CommonText
from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.step_objectives import common_text_of
from gkd_jax.objectives.spans import span_metrics


def make_retokenizer(experiment: Experiment, vocabulary: Vocabulary) -> "Retokenizer | None":
    """Returns the run's retokenizer, or None if the teacher uses the student's tokens.

    Args:
      experiment: the run.
      vocabulary: the student's vocabulary.
    """
    common = common_text_of(experiment, vocabulary)
    if common is None:
        return None
    assert experiment.teacher is not None
    own = experiment.teacher.own_tokens
    assert own is not None
    return Retokenizer(common, experiment.partitioner, targets_length=own.targets_length)


class Retokenizer:
    """Tokenizes the outputs of a batch for the teacher, and adds the tokens to the batch.

    The outputs may be samples or targets of the data. They are retokenized on the host, which
    therefore waits for a rollout to finish. Each process retokenizes its own rows.
    """

    def __init__(
        self, common: CommonText, partitioner: Partitioner, *, targets_length: int | None = None
    ):
        """Creates the retokenizer.

        Args:
          common: alignment of the two vocabularies.
          partitioner: shards the result over devices like a batch.
          targets_length: maximum number of the teacher's tokens in an output; None uses the length
            of `targets`.
        """
        self._common = common
        self._partitioner = partitioner
        self._targets_length = targets_length

    def __call__(self, batch: Batch) -> tuple[Batch, Metrics]:
        """Returns the batch with `teacher_tokens`, and metrics of how well the tokens align."""
        rows, weights = self._partitioner.local_rows((batch.targets, batch.loss_weights))
        tokens = self._partitioner.shard_batch(self.retokenize(rows, weights))
        return (
            dataclasses.replace(batch, teacher_tokens=tokens),
            _jit_metrics()(tokens, batch.loss_weights),
        )

    def retokenize(
        self, targets: Int[np.ndarray, "B T"], loss_weights: Float[np.ndarray, "B T"]
    ) -> TeacherTokens:
        """Returns the teacher's tokens of local rows, as NumPy arrays."""
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
            # The first span that has a token beyond `width` and all later spans are dropped.
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


@functools.cache
def _jit_metrics() -> Callable[[TeacherTokens, Array], Metrics]:
    return jax.jit(span_metrics)
