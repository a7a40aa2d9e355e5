"""Arithmetic reasoning: GSM8K, and the generated problems of `data.arithmetic`."""

import dataclasses
import re
from collections.abc import Mapping

from gkd_jax.data.arithmetic import ArithmeticProblems
from gkd_jax.data.metrics.gsm8k import gsm8k_accuracy
from gkd_jax.data.recipes.text import FieldsToText
from gkd_jax.data.sources import TfdsSource
from gkd_jax.data.task import MetricFn, RawExample, SourceConfig, Task, TextExample

CHAIN_OF_THOUGHT_EXEMPLARS: tuple[tuple[str, str], ...] = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. "
        "After they are done, there will be 21 trees. How many trees did the grove workers plant "
        "today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. "
        "So there must have been 21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the "
        "parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they "
        "have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = "
        "74. After eating 35, they had 74 - 35 = 39. The answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How "
        "many lollipops did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave "
        "Denny 20 - 12 = 8. The answer is 8.",
    ),
)
"""The first four (question, worked answer) pairs of the exemplars for math word problems in Wei et
al., "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models" (arXiv 2201.11903).
They are quoted from the paper, since results are comparable only with the same prompt."""

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_ANSWER_FORMATS = ("chain_of_thought", "original")


@dataclasses.dataclass(frozen=True)
class GSM8KText:
    """Text of an example of GSM8K: exemplars and question, and a worked answer.

    Attributes:
      question_field: field with the question.
      answer_field: field with the answer: a worked answer in GSM8K's format (steps, '####',
        number) or in another format. If `rationale_field` is set, the number alone.
      rationale_field: field with the steps if they are separate, as in FLAN's TSVs.
      answer_format: 'chain_of_thought' makes sentences that end with 'The answer is N.';
        'original' keeps newlines, annotations and '####', which T5's vocabulary cannot represent.
      exemplars: (question, worked answer) pairs.
      num_exemplars: number of exemplars before each question.
    """

    question_field: str = "question"
    answer_field: str = "answer"
    rationale_field: str | None = None
    answer_format: str = "chain_of_thought"
    exemplars: tuple[tuple[str, str], ...] = ()
    num_exemplars: int = 0

    def __post_init__(self) -> None:
        if self.answer_format not in _ANSWER_FORMATS:
            raise ValueError(
                f"gsm8k.answer_format must be one of {', '.join(_ANSWER_FORMATS)}; got "
                f"{self.answer_format!r}."
            )

    def __call__(self, example: RawExample) -> TextExample:
        """Returns the text.

        Raises:
          KeyError: the example lacks a field.
        """
        question = example[self.question_field]
        # An exemplar with the same question would reveal the answer.
        others = [pair for pair in self.exemplars if pair[0] != question][: self.num_exemplars]
        lines = [f"Q: {asked}\nA: {answered}\n\n" for asked, answered in others]
        targets, reference = self._targets(example)
        return TextExample(
            inputs=f"{''.join(lines)}Q: {question}\nA:", targets=targets, references=(reference,)
        )

    def _targets(self, example: RawExample) -> tuple[str, str]:
        """Returns the worked answer and the final number."""
        answer = example[self.answer_field]
        if self.rationale_field is not None:
            return f"{example[self.rationale_field]} The answer is {answer}.", answer
        steps, marker, final = answer.partition("####")
        final = final.strip()
        if not marker:  # A worked answer in another format, e.g. one that a teacher generated.
            return answer, answer
        if self.answer_format == "original":
            return answer, final
        return f"{_as_sentences(steps)} The answer is {final}.", final


def _as_sentences(steps: str) -> str:
    """Converts GSM8K's steps, one per line with calculator annotations, to plain sentences."""
    lines = [line.strip() for line in _ANNOTATION.sub("", steps).splitlines()]
    return " ".join(line if line[-1] in ".!?" else f"{line}." for line in lines if line)


def gsm8k(
    *,
    name: str = "gsm8k",
    train: SourceConfig | None = None,
    validation: SourceConfig | None = None,
    test: SourceConfig | None = None,
    num_exemplars: int = 4,
    exemplars: SourceConfig | None = None,
    question_field: str = "question",
    answer_field: str = "answer",
    rationale_field: str | None = None,
    answer_format: str = "chain_of_thought",
    metrics: tuple[MetricFn, ...] = (gsm8k_accuracy,),
) -> Task:
    """Returns the task GSM8K: grade-school word problems with chain-of-thought answers.

    Cobbe et al., "Training Verifiers to Solve Math Word Problems" (arXiv 2110.14168).

    Args:
      name: name of the task.
      train: training examples; None uses gsm8k of TFDS.
      validation: held-out examples; None omits the split, since GSM8K has none.
      test: test examples; None uses the test split of TFDS, on which the GKD paper reports.
      num_exemplars: number of solved problems before each question; 4 in the GKD paper.
      exemplars: source of other exemplars, used in order from the first; None uses the first four
        of Wei et al. (`CHAIN_OF_THOUGHT_EXEMPLARS`).
      question_field, answer_field, rationale_field, answer_format: see `GSM8KText`.
      metrics: metric functions of evaluations.

    Returns:
      The task, with splits 'train', 'test' and, if given, 'validation'.

    Raises:
      ValueError: the answer format is unknown, or there are fewer than `num_exemplars` exemplars.
      FileNotFoundError: the file of `exemplars` does not exist.
    """
    to_text = GSM8KText(question_field, answer_field, rationale_field, answer_format)
    pairs = CHAIN_OF_THOUGHT_EXEMPLARS
    if exemplars is not None and num_exemplars:
        pairs = _exemplars(exemplars, to_text, num_exemplars)
    if not 0 <= num_exemplars <= len(pairs):
        raise ValueError(
            f"gsm8k.num_exemplars must be from 0 to {len(pairs)}; got {num_exemplars}. Set "
            "gsm8k.exemplars to a source with more of them."
        )
    sources: dict[str, SourceConfig] = {
        "train": train or TfdsSource("gsm8k", "train"),
        "test": test or TfdsSource("gsm8k", "test"),
    }
    if validation is not None:
        sources["validation"] = validation
    return Task(
        name=name,
        sources=sources,
        to_text=dataclasses.replace(to_text, exemplars=pairs, num_exemplars=num_exemplars),
        metrics=metrics,
    )


def _exemplars(
    config: SourceConfig, to_text: GSM8KText, num_exemplars: int
) -> tuple[tuple[str, str], ...]:
    """Reads one exemplar more than `num_exemplars`.

    If the question of an example is itself among the exemplars, the additional one replaces it.
    """
    source = config.open()
    examples = [source[index] for index in range(min(num_exemplars + 1, len(source)))]
    return tuple(
        (example[to_text.question_field], to_text(example).targets) for example in examples
    )


def arithmetic(
    *,
    name: str = "arithmetic",
    num_train: int = 100_000,
    num_heldout: int = 512,
    seed: int = 0,
    min_steps: int = 2,
    max_steps: int = 3,
    max_operand: int = 20,
    max_factor: int = 4,
    max_value: int = 99,
    num_wordings: int = 4,
    metrics: tuple[MetricFn, ...] = (gsm8k_accuracy,),
) -> Task:
    """Returns a task of arithmetic word problems with worked solutions, made by a generator.

    With a byte vocabulary, prompts of up to 3 steps take at most 84 tokens and outputs at most
    38, including the end-of-sequence token.

    Args:
      name: name of the task.
      num_train: number of training examples, which take no memory.
      num_heldout: number of examples of 'validation' and of 'test' each.
      seed: different seeds draw different problems; splits share no problem under any seed.
      min_steps, max_steps, max_operand, max_factor, max_value, num_wordings: difficulty, see
        `ArithmeticProblems`.
      metrics: metric functions of evaluations.

    Returns:
      The task, with splits 'train', 'validation' and 'test'.

    Raises:
      ValueError: `ArithmeticProblems` rejects a setting.
    """
    counts: Mapping[str, int] = {
        "train": num_train,
        "validation": num_heldout,
        "test": num_heldout,
    }
    sources = {
        split: ArithmeticProblems(
            split,
            count,
            seed=seed,
            min_steps=min_steps,
            max_steps=max_steps,
            max_operand=max_operand,
            max_factor=max_factor,
            max_value=max_value,
            num_wordings=num_wordings,
        )
        for split, count in counts.items()
    }
    to_text = FieldsToText("question", "answer")
    return Task(name=name, sources=sources, to_text=to_text, metrics=metrics)
