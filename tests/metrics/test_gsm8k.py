import json
import math
from fractions import Fraction

import pytest

from gkd_jax.data.metrics.calculator import apply_calculator
from gkd_jax.data.metrics.gsm8k import gsm8k_accuracy, parse_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 7+5=12 pens.\n#### 12", 12),
        ("#### 1,234", 1234),
        ("#### $1,234,567.50", Fraction("1234567.5")),
        ("#### -7", -7),
        ("#### -$7", -7),
        ("#### $-7", -7),
        ("#### \N{MINUS SIGN}7", -7),
        ("#### 9.", 9),
        ("#### 9.0", 9),
        ("#### .5", Fraction(1, 2)),
        ("#### 12 pens, not 13", 12),
        ("#### 5+4=9", 9),
        ("3 4 #### 5\n#### 6", 5),
        ("#### ", None),
        ("7 pens. ####", None),
        ("The answer is 9.", 9),
        ("the answer is $9.50.", Fraction("9.5")),
        ("The answer is 4 times 2. The answer is 8. There are 3 left.", 8),
        ("The answer is 5 + 4 = 9.", 9),
        ("The answer is 9 apples, 3 of them red.", 9),
        ("The final answer is 12", 12),
        ("He had 7, then 12.", 12),
        ("16-7", 7),
        ("16 - 7", 7),
        ("so x=-7", -7),
        ("(-7)", -7),
        ("2, 3", 3),
        ("1,23", 23),
        ("no number", None),
        ("", None),
    ],
)
def test_answers_are_parsed(text, answer):
    assert parse_answer(text) == answer


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_answer_of_gsm8k_parses_to_itself(external_data, split):
    path = external_data / "gsm8k" / f"{split}.jsonl"
    answers = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    assert len(answers) == {"train": 7473, "test": 1319}[split]
    changed = 0
    for answer in answers:
        steps, _, final = answer.partition("####")
        number = Fraction(final.strip().replace(",", ""))
        assert parse_answer(answer) == number
        assert parse_answer(f"{steps}The answer is {final.strip()}.") == number
        changed += parse_answer(apply_calculator(answer)) != number
    # Of the gold solutions themselves, 18 and 1 have equations that are wrong as they stand.
    assert changed <= {"train": 18, "test": 1}[split]
    perfect = gsm8k_accuracy([[answer] for answer in answers], answers)["gsm8k_accuracy"]
    assert (perfect.value, perfect.standard_error) == (100.0, 0.0)


def test_accuracy_compares_numbers():
    references = [["#### 9"], ["#### 1,000"], ["#### 3"], ["#### 4"]]
    predictions = ["so 9.0", "The answer is $1000.", "4", "none"]
    score = gsm8k_accuracy(references, predictions)["gsm8k_accuracy"]
    assert score.value == 50.0
    assert score.standard_error == pytest.approx(100 * math.sqrt(0.25 / 4))
    assert score.detail == "2 of 4, 1 without a number"


def test_accuracy_with_the_calculator():
    references = [["#### 9"], ["#### 10"]]
    predictions = ["7+5=13. 13-3=10. #### 10", "7+5=13. 13-3=10. #### 10"]
    plain = gsm8k_accuracy(references, predictions)["gsm8k_accuracy"]
    corrected = gsm8k_accuracy(references, predictions, use_calculator=True)["gsm8k_accuracy"]
    assert plain.value == corrected.value == 50.0
    first = gsm8k_accuracy(references[:1], predictions[:1], use_calculator=True)
    assert first["gsm8k_accuracy"].value == 100.0
    assert first["gsm8k_accuracy"].detail.endswith("with calculator")


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(ValueError, match=r"references\[1\] must hold a final answer"):
        gsm8k_accuracy([["1"], ["none"]], ["1", "1"])
