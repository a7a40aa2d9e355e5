"""Instruction tuning: FLAN-style data from any source, and a mixture similar to FLAN 2021."""

import os
import re
from collections.abc import Callable

from gkd_jax.data.metrics.text_metrics import exact_match
from gkd_jax.data.mixtures import Mixture, Templated
from gkd_jax.data.recipes.text import FieldsToText
from gkd_jax.data.sources import TfdsSource, Tsv
from gkd_jax.data.task import MetricFn, SourceConfig, Task, unchanged

_ANSWER_PHRASE = re.compile(r"the\s+(?:final\s+)?answer\s+is:?\s*", re.IGNORECASE)


def final_answer(output: str) -> str:
    """Returns the text after the last 'the answer is', or the whole text without such a phrase.

    Only the rest of the phrase's line is returned, without a full stop at the end. Use this
    function as the output parser of chain-of-thought data, so that metrics compare only final
    answers.
    """
    phrases = list(_ANSWER_PHRASE.finditer(output))
    if not phrases:
        return output.strip()
    return output[phrases[-1].end() :].partition("\n")[0].strip().removesuffix(".").strip()


def instruction(
    *,
    train: SourceConfig,
    validation: SourceConfig | None = None,
    test: SourceConfig | None = None,
    name: str = "instruction",
    inputs_field: str = "inputs",
    targets_field: str = "targets",
    output_parser: Callable[[str], str] = unchanged,
    metrics: tuple[MetricFn, ...] = (exact_match,),
) -> Task:
    """Returns a task of instructions and responses.

    JSON lines with the fields 'inputs' and 'targets' can be used directly, FLAN's chain-of-thought
    TSVs through `flan_cot_tsv`, other formats through `Templated`, and several sources through
    `Mixture`.

    Args:
      train: training examples.
      validation: validation examples; None omits the split.
      test: test examples; None omits the split.
      name: name of the task.
      inputs_field: field with the whole prompt.
      targets_field: field with the response.
      output_parser: function that is applied to predictions and references before metrics are
        computed, e.g. `final_answer`.
      metrics: metric functions of evaluations.

    Returns:
      The task, with the given splits.
    """
    given = {"train": train, "validation": validation, "test": test}
    return Task(
        name=name,
        sources={split: source for split, source in given.items() if source is not None},
        to_text=FieldsToText(inputs_field, targets_field, output_parser=output_parser),
        metrics=metrics,
        output_parser=output_parser,
    )


def flan_cot_tsv(
    path: str | os.PathLike[str] | tuple[str, ...],
    *,
    inputs: str = "{input}\nLet's think step by step.",
    targets: str = "{rationale} The answer is {answer}.",
) -> Templated:
    """Returns a source of FLAN's chain-of-thought files.

    The files have tab-separated columns for input, answer and rationale, and no header.

    Args:
      path: one file or several, plain or '.gz'.
      inputs: template of the prompt over the three fields.
      targets: template of the output.

    Returns:
      A source with the fields 'inputs' and 'targets'.
    """
    source = Tsv(path, columns=("input", "answer", "rationale"))
    return Templated(source, inputs, targets, unescape_newlines=True)


# A few of FLAN 2021's 62 data sets, one or two of each kind, with templates of our own. Maps the
# name of a TFDS data set to (template of the prompt, template of the output, `Templated.labels`).
_FLAN_TEMPLATES: dict[str, tuple[str, str, dict[str, tuple[str, ...]]]] = {
    "glue/rte": (
        "{sentence1}\n\nDoes it follow that {sentence2}\nOptions:\n- yes\n- no",
        "{label}",
        {"label": ("yes", "no")},
    ),
    "super_glue/boolq": (
        "{passage}\n\nAnswer from the text above: {question}?\nOptions:\n- no\n- yes",
        "{label}",
        {"label": ("no", "yes")},
    ),
    "super_glue/copa": (
        "{premise}\nWhat is the {question}?\nOptions:\n- {choice1}\n- {choice2}",
        "{label}",
        {"label": ("{choice1}", "{choice2}")},
    ),
    "piqa": (
        "How is this best done? {goal}\nOptions:\n- {sol1}\n- {sol2}",
        "{label}",
        {"label": ("{sol1}", "{sol2}")},
    ),
    "glue/sst2": (
        "Review: {sentence}\nIs this review positive or negative?",
        "{label}",
        {"label": ("negative", "positive")},
    ),
    "glue/qqp": (
        "{question1}\n{question2}\nDo these two questions ask the same?\nOptions:\n- no\n- yes",
        "{label}",
        {"label": ("no", "yes")},
    ),
    "ag_news_subset": (
        "{title}\n{description}\nWhat is this news about?\nOptions:\n- world\n- sports\n"
        "- business\n- science and technology",
        "{label}",
        {"label": ("world", "sports", "business", "science and technology")},
    ),
    "gigaword": ("Write a headline for this sentence: {document}", "{summary}", {}),
}
# Validation splits of data sets that have no public split named 'validation'.
_VALIDATION_SPLITS = {"ag_news_subset": "test"}


def flan2021(
    *,
    name: str = "flan2021",
    train: SourceConfig | None = None,
    validation: SourceConfig | None = None,
    test: SourceConfig | None = None,
    output_parser: Callable[[str], str] = unchanged,
    metrics: tuple[MetricFn, ...] = (exact_match,),
) -> Task:
    """Returns a task of instruction tuning similar to FLAN 2021.

    Wei et al., "Finetuned Language Models Are Zero-Shot Learners" (arXiv 2109.01652). The default
    is a mixture of eight of FLAN's data sets from TFDS, with templates of our own. As in the paper,
    at most 30,000 examples of each data set are used, and mixing is examples-proportional with a
    maximum rate of 3,000. The default is a small substitute: for the whole collection, bind `train`
    to exported files or use FLAN's own seqio mixture.

    Args:
      name: name of the task.
      train: training examples with the fields 'inputs' and 'targets'.
      validation: validation examples; None uses up to 200 validation examples of each data set of
        the default mixture.
      test: test examples; None omits the split.
      output_parser: function that is applied to predictions and references before metrics are
        computed, e.g. `final_answer` for chain-of-thought data.
      metrics: metric functions of evaluations.

    Returns:
      The task.
    """
    return instruction(
        train=train or Mixture(_flan_sources("train"), max_examples=30_000, rate_maximum=3_000),
        validation=validation or Mixture(_flan_sources("validation"), max_examples=200),
        test=test,
        name=name,
        output_parser=output_parser,
        metrics=metrics,
    )


def _flan_sources(split: str) -> tuple[SourceConfig, ...]:
    sources = []
    for data_set, (inputs, targets, labels) in _FLAN_TEMPLATES.items():
        its_split = _VALIDATION_SPLITS.get(data_set, split) if split == "validation" else split
        sources.append(Templated(TfdsSource(data_set, its_split), inputs, targets, labels))
    return tuple(sources)
