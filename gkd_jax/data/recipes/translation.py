"""Translation: WMT14 English to German, and parallel text in any two languages."""

from gkd_jax.data.metrics.text_metrics import bleu
from gkd_jax.data.recipes.text import FieldsToText
from gkd_jax.data.sources import TfdsSource
from gkd_jax.data.task import MetricFn, SourceConfig, Task

_WMT14 = "wmt14_translate/de-en"


def wmt14_en_de(
    *,
    name: str = "wmt14_en_de",
    train: SourceConfig | None = None,
    validation: SourceConfig | None = None,
    test: SourceConfig | None = None,
    prefix: str = "translate English to German: ",
    inputs_field: str = "en",
    targets_field: str = "de",
    metrics: tuple[MetricFn, ...] = (bleu,),
) -> Task:
    """WMT14 English to German with cased BLEU, as T5 and GKD set it up.

    Any split may come from files at hand, e.g. `ParallelText('train.en', 'train.de')`; with
    another prefix and other fields it is any other pair of languages.

    Args:
      name: the task's name.
      train: training examples; None is TFDS's wmt14_translate/de-en.
      validation: None is newstest2013, TFDS's validation split.
      test: None is newstest2014.
      prefix: before each source sentence.
      inputs_field: field of the source sentence ('inputs' is understood as well).
      targets_field: field of the translation ('targets' is understood as well).
      metrics: metric functions of an evaluation.

    Returns:
      The task, with splits 'train', 'validation' and 'test'.
    """
    return Task(
        name=name,
        sources={
            "train": train or TfdsSource(_WMT14, "train"),
            "validation": validation or TfdsSource(_WMT14, "validation"),
            "test": test or TfdsSource(_WMT14, "test"),
        },
        to_text=FieldsToText(inputs_field, targets_field, prefix),
        metrics=metrics,
    )
