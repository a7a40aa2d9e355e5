"""Summarization: XSum."""

from gkd_jax.data.metrics.text_metrics import rouge
from gkd_jax.data.recipes.text import FieldsToText
from gkd_jax.data.sources import TfdsSource
from gkd_jax.data.task import MetricFn, SourceConfig, Task


def xsum(
    *,
    name: str = "xsum",
    train: SourceConfig | None = None,
    validation: SourceConfig | None = None,
    test: SourceConfig | None = None,
    prefix: str = "summarize: ",
    inputs_field: str = "document",
    targets_field: str = "summary",
    metrics: tuple[MetricFn, ...] = (rouge,),
) -> Task:
    """XSum with ROUGE: one sentence that says what a news article is about.

    TFDS cannot download XSum's articles by itself: its page on xsum says how to prepare them by
    hand. JSON lines with the fields 'document' and 'summary' serve as well.

    Args:
      name: the task's name.
      train: training examples; None is TFDS's xsum.
      validation: None is TFDS's validation split, on which the GKD paper reports.
      test: None is TFDS's test split.
      prefix: before each article.
      inputs_field: field of the article ('inputs' is understood as well).
      targets_field: field of the summary ('targets' is understood as well).
      metrics: metric functions of an evaluation.

    Returns:
      The task, with splits 'train', 'validation' and 'test'.
    """
    return Task(
        name=name,
        sources={
            "train": train or TfdsSource("xsum", "train"),
            "validation": validation or TfdsSource("xsum", "validation"),
            "test": test or TfdsSource("xsum", "test"),
        },
        to_text=FieldsToText(inputs_field, targets_field, prefix),
        metrics=metrics,
    )
