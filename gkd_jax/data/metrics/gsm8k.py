"""The final answer of a worked solution, and the accuracy on GSM8K."""

import re
from fractions import Fraction

from gkd_jax.data.metrics.calculator import MINUS_SIGN, NUMBER, apply_calculator, to_fraction
from gkd_jax.data.metrics.score import Score, check_pairs, share_score

__all__ = ["apply_calculator", "gsm8k_accuracy", "parse_answer"]

# A minus is a sign only if no operand precedes it: '16-7' ends with 7, not -7.
_SIGNED_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.,)])[-{MINUS_SIGN}])?(?:\$\s?)?"
    rf"(?P<inner_sign>(?<=\$)[-{MINUS_SIGN}])?(?P<number>{NUMBER})"
)
_ANSWER_PHRASE = re.compile(r"the\s+(?:final\s+)?answer\s+is", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?:\s|$)")


def parse_answer(text: str) -> Fraction | None:
    """Returns the final number of a worked solution.

    If the text contains '####' (GSM8K's format), the number after the first '####' is returned.
    Otherwise, if the text contains 'The answer is' (chain-of-thought format), the number that
    follows the last such phrase in the same sentence is returned. Otherwise the last number of the
    text is returned. If an equation follows '####' or the phrase, its right-hand side is used.
    Dollar signs, thousands separators, a trailing full stop and decimals are supported.

    Args:
      text: a solution, from the data or generated.

    Returns:
      The exact value, so that '9', '9.0' and '$9.00' are equal; None if there is no number.
    """
    _, marker, conclusion = text.partition("####")
    if marker:
        return _concluding_number(conclusion.lstrip().partition("\n")[0])
    phrases = list(_ANSWER_PHRASE.finditer(text))
    if phrases:
        return _concluding_number(_SENTENCE_END.split(text[phrases[-1].end() :].lstrip())[0])
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _concluding_number(text: str) -> Fraction | None:
    numbers = _numbers(text.rpartition("=")[2])
    return numbers[0] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    values = []
    for match in _SIGNED_NUMBER.finditer(text):
        value = to_fraction(match["number"])
        values.append(-value if match["sign"] or match["inner_sign"] else value)
    return values


def gsm8k_accuracy(
    references: list[list[str]], predictions: list[str], *, use_calculator: bool = False
) -> dict[str, Score]:
    """Computes the share of predictions whose final answer is numerically equal to a reference.

    Args:
      references: worked solutions, or plain answers.
      predictions: generated solutions.
      use_calculator: whether to correct the equations of the predictions first (see
        `apply_calculator`), as the GKD paper does for GSM8K.

    Returns:
      `{'gsm8k_accuracy': score}` in percent with its binomial standard error. `Score.detail` says
      how many predictions contain no number.

    Raises:
      ValueError: the lists differ in length, or a reference has no number.
    """
    check_pairs(references, predictions)
    num_right = num_silent = 0
    for index, (texts, prediction) in enumerate(zip(references, predictions, strict=True)):
        gold = {parse_answer(text) for text in texts}
        if None in gold:
            raise ValueError(
                f"references[{index}] must hold a final answer; got {texts!r}. Check the "
                "task's target field, or use another metric."
            )
        answer = parse_answer(apply_calculator(prediction) if use_calculator else prediction)
        num_right += answer in gold
        num_silent += answer is None
    detail = f"{num_right} of {len(predictions)}, {num_silent} without a number"
    if use_calculator:
        detail += ", with calculator"
    return {"gsm8k_accuracy": share_score(num_right, len(predictions), detail=detail)}
