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
    """Returns the task XSum with ROUGE: summaries of news articles in one sentence.

    Narayan et al., "Don't Give Me the Details, Just the Summary!" (arXiv 1808.08745). TFDS cannot
    download the articles of XSum automatically: its page on xsum describes the manual preparation.
    JSON lines with the fields 'document' and 'summary' can be used instead.

    Args:
      name: name of the task.
      train: training examples; None uses xsum of TFDS.
      validation: validation examples; None uses the validation split of TFDS, on which the GKD
        paper reports.
      test: test examples; None uses the test split of TFDS.
      prefix: prepended to each article.
      inputs_field: field with the article ('inputs' is accepted too).
      targets_field: field with the summary ('targets' is accepted too).
      metrics: metric functions of evaluations.

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
