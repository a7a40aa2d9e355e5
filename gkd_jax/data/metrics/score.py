"""The value of a metric with its uncertainty."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of an evaluation.

    Attributes:
      value: the metric, on the scale that is usual in papers (percent for all text metrics).
      standard_error: standard error of `value` over the choice of examples, on the same scale; None
        if it is not defined, e.g. for a single example.
      detail: information needed to reproduce or judge the number, e.g. sacrebleu's signature.
    """

    value: float
    standard_error: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ± {self.standard_error:.2f}"


MetricFn: TypeAlias = Callable[[list[list[str]], list[str]], dict[str, Score]]
"""Function of (references of each example, predictions) that returns a score for each name."""


def check_pairs(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> None:
    """Checks the arguments of a metric function.

    Raises:
      ValueError: there are no examples, the lists differ in length, or an example has no reference.
    """
    if len(references) != len(predictions):
        raise ValueError(
            "references and predictions must have the same length; got "
            f"{len(references)} and {len(predictions)}. Give one list of references for each "
            "prediction, in the same order."
        )
    if not predictions:
        raise ValueError(
            "predictions must not be empty: no metric is defined on 0 examples. Check the "
            "evaluation split and the number of evaluation examples."
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(
                f"references[{index}] must be a list of at least one string; got {texts!r}. "
                "Wrap a single reference in a list."
            )


def mean_score(values: Sequence[float], *, scale: float = 100.0, detail: str = "") -> Score:
    """Computes the mean of per-example values with its standard error, s/sqrt(n).

    Args:
      values: one value per example.
      scale: factor of value and standard error; 100 converts shares to percent.
      detail: `Score.detail`.

    Returns:
      The mean and its standard error, from the unbiased variance (with divisor n - 1). The standard
      error of a single example is None.
    """
    count = len(values)
    mean = math.fsum(values) / count
    error = None
    if count > 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        error = scale * math.sqrt(variance / count)
    return Score(scale * mean, error, detail)


def share_score(num_true: int, count: int, *, detail: str = "") -> Score:
    """Computes a share in percent with its binomial standard error, 100 sqrt(p(1-p)/n).

    Args:
      num_true: number of correct examples.
      count: number of all examples, at least one.
      detail: `Score.detail`; defaults to '<num_true> of <count>'.
    """
    share = num_true / count
    error = 100.0 * math.sqrt(share * (1.0 - share) / count)
    return Score(100.0 * share, error, detail or f"{num_true} of {count}")
