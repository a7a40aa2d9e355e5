"""Metrics of seqio tasks as metric functions.

A seqio metric receives postprocessed targets and predictions, which may have any type. In gkd_jax
references are text, so a postprocessed target of another type is encoded as JSON.
"""

import dataclasses
import importlib
import json
from typing import Any

import numpy as np

from gkd_jax.data.metrics.score import Score, check_pairs

_JSON_PREFIX = "json:"


def encode_reference(target: Any) -> str:
    """Encodes a postprocessed target as text. Strings are unchanged; other types become JSON.

    A string that starts with the prefix of encoded JSON is encoded too.

    Raises:
      ValueError: the target does not consist of text, numbers, lists and dictionaries.
    """
    if isinstance(target, str) and not target.startswith(_JSON_PREFIX):
        return target
    try:
        return _JSON_PREFIX + json.dumps(target, default=_plain)
    except TypeError as error:
        raise ValueError(
            f"the task's postprocess_fn makes a {type(target).__name__} of a target, which cannot "
            f"be kept ({error}). Let it return text, numbers, lists or dictionaries."
        ) from error


def decode_reference(reference: str) -> Any:
    """Returns the target that `encode_reference` encoded."""
    if reference.startswith(_JSON_PREFIX):
        return json.loads(reference.removeprefix(_JSON_PREFIX))
    return reference


def _plain(value: Any) -> Any:
    """Converts NumPy arrays and numbers, and bytes, to types that JSON supports."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


@dataclasses.dataclass(frozen=True)
class SeqioMetric:
    """A metric function of a seqio task that takes (targets, predictions).

    Attributes:
      task_name: name of a registered seqio task.
      number: index of the metric in the task's `predict_metric_fns`.
    """

    task_name: str
    number: int

    def __call__(self, references: list[list[str]], predictions: list[str]) -> dict[str, Score]:
        """Applies the task's postprocessing to the predictions and computes its metric.

        Raises:
          ValueError: the lists differ in length, or the task's functions fail on the outputs.
        """
        check_pairs(references, predictions)
        seqio = importlib.import_module("seqio")
        task = seqio.TaskRegistry.get(self.task_name)
        metric_fn = task.predict_metric_fns[self.number]
        targets = [decode_reference(texts[0]) for texts in references]
        try:
            outputs = [task.postprocess_fn(p, example=None, is_target=False) for p in predictions]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"The postprocess_fn of seqio task {self.task_name!r} fails on a prediction: "
                f"{error!r}. It gets example=None, since only text and tokens of an example are "
                "kept: let it use `example` for targets alone."
            ) from error
        scores = {}
        for name, value in metric_fn(targets, outputs).items():
            number = value.value if isinstance(value, seqio.metrics.Scalar) else value
            if np.ndim(number) == 0 and not isinstance(number, (str, seqio.metrics.MetricValue)):
                scores[name] = Score(float(number), detail=f"seqio task {self.task_name}")
        return scores
