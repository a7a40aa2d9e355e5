"""A metric's value with what is known of its uncertainty."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of an evaluation.

    Attributes:
      value: the metric, on the scale on which papers print it (percent for every text metric).
      standard_error: one standard error of `value` over the choice of examples, on the same
        scale; None where it is not defined, e.g. for a single example.
      detail: what a reader needs to reproduce or judge the number, e.g. sacrebleu's signature.
    """

    value: float
    standard_error: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ± {self.standard_error:.2f}"


MetricFn: TypeAlias = Callable[[list[list[str]], list[str]], dict[str, Score]]
"""References (at least one for each example) and predictions to named scores."""


def check_pairs(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> None:
    """Refuses what no metric can score.

    Raises:
      ValueError: no examples, lists of different length, or an example without a reference.
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
    """Mean of per-example values with the standard error of the mean, s/sqrt(n).

    Args:
      values: one value an example.
      scale: factor on value and standard error; 100 turns shares into percent.
      detail: passed on.

    Returns:
      The mean; its standard error from the unbiased variance (n - 1), None for one example.
    """
    count = len(values)
    mean = math.fsum(values) / count
    error = None
    if count > 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        error = scale * math.sqrt(variance / count)
    return Score(scale * mean, error, detail)


def share_score(num_true: int, count: int, *, detail: str = "") -> Score:
    """A share in percent with its binomial standard error, 100 sqrt(p(1-p)/n).

    Args:
      num_true: examples that are right.
      count: all examples, at least one.
      detail: passed on; the counts when empty.
    """
    share = num_true / count
    error = 100.0 * math.sqrt(share * (1.0 - share) / count)
    return Score(100.0 * share, error, detail or f"{num_true} of {count}")
