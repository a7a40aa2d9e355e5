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
    """Returns the task WMT14 English to German with cased BLEU, as in T5 and GKD.

    Any split may use local files, e.g. `ParallelText('train.en', 'train.de')`. For another pair of
    languages, set the sources and the prefix. If the fields are not 'inputs' and 'targets', set
    them too.

    Args:
      name: name of the task.
      train: training examples; None uses wmt14_translate/de-en of TFDS.
      validation: validation examples; None uses newstest2013, the validation split of TFDS.
      test: test examples; None uses newstest2014.
      prefix: prepended to each source sentence.
      inputs_field: field with the source sentence ('inputs' is accepted too).
      targets_field: field with the translation ('targets' is accepted too).
      metrics: metric functions of evaluations.

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
