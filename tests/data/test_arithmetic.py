import collections
import re

import pytest

from gkd_jax.data.arithmetic import ArithmeticProblems, solution, split_of
from gkd_jax.data.metrics.calculator import apply_calculator
from gkd_jax.data.metrics.gsm8k import gsm8k_accuracy, parse_answer

_EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)\.")
_OPERATION_OF_WORDS = {
    "buys": "+",
    "finds": "+",
    "makes": "+",
    "gets": "+",
    "sells": "-",
    "loses": "-",
    "gives": "-",
    "breaks": "-",
}


def _read_question(question):
    """The numbers and operations that a question's words say, by an independent reading."""
    body, _, rest = question.partition(". ")
    assert rest == "How many?"
    opening, *clauses = body.split(", ")
    start = int(re.fullmatch(r"[A-Z]\w+ has (\d+) \w+", opening)[1])
    steps = []
    for clause in clauses:
        operand = int(re.search(r"\d+", clause)[0])
        times = "times" in clause or "fold" in clause
        steps.append(("*" if times else _OPERATION_OF_WORDS[clause.split()[0]], operand))
    return start, steps


def _result(start, steps):
    for operation, operand in steps:
        start = {"+": start + operand, "-": start - operand, "*": start * operand}[operation]
    return start


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_solutions_are_right(split):
    problems = ArithmeticProblems(split, 1000, seed=1)
    answers = []
    for index in range(1000):
        example = problems[index]
        start, steps = _read_question(example["question"])
        value = start
        equations = _EQUATION.findall(example["answer"])
        assert [(operation, int(right)) for _, operation, right, _ in equations] == steps
        for left, operation, right, result in equations:
            assert int(left) == value
            value = _result(value, [(operation, int(right))])
            assert int(result) == value
            assert 1 <= value <= 99
        assert example["answer"].endswith(f" #### {value}")
        assert parse_answer(example["answer"]) == _result(start, steps)
        assert apply_calculator(example["answer"]) == example["answer"]
        assert 2 <= len(steps) <= 3
        answers.append(example["answer"])
    score = gsm8k_accuracy([[answer] for answer in answers], answers)["gsm8k_accuracy"]
    assert score.value == 100.0


def test_texts_are_short_ascii():
    examples = [ArithmeticProblems("train", 5000)[index] for index in range(5000)]
    assert all((example["question"] + example["answer"]).isascii() for example in examples)
    assert max(len(example["question"]) for example in examples) <= 83
    assert max(len(example["answer"]) for example in examples) <= 37


def _problems(source):
    return {_key(*_read_question(source[index]["question"])) for index in range(len(source))}


def _key(start, steps):
    """Numbers and operations; the order of the first sum or product does not matter."""
    (operation, operand), *others = steps
    first = {start, operand} if operation in "+*" else (start, operand)
    return str((sorted(first) if operation in "+*" else first, operation, others))


def test_no_heldout_problem_occurs_in_training():
    """Whatever the wording, the seed or the difficulty of either."""
    training = _problems(ArithmeticProblems("train", 15_000, seed=0))
    training |= _problems(ArithmeticProblems("train", 5_000, seed=5, max_steps=2, min_steps=1))
    test = _problems(ArithmeticProblems("test", 1_000, seed=0))
    assert len(test) == 1_000, "a held-out split holds no problem twice"
    two_steps = _problems(ArithmeticProblems("test", 500, seed=7, max_steps=2))
    assert len(two_steps) == 500
    test |= two_steps
    validation = _problems(ArithmeticProblems("validation", 1_000, seed=0))
    # Training meets most problems of two steps: a random split would share many of them.
    assert len(training) > 9_000
    assert not test & training
    assert not validation & training
    assert not validation & test


def test_the_split_of_a_problem_ignores_the_order_of_its_first_sum():
    assert split_of(7, [("+", 5), ("-", 3)]) == split_of(5, [("+", 7), ("-", 3)])
    shares = collections.Counter(split_of(n, [("+", 5), ("-", 3)]) for n in range(10_000))
    assert shares["train"] == pytest.approx(8000, abs=200)
    assert shares["test"] == pytest.approx(1000, abs=150)


def test_examples_are_pure_functions_of_seed_split_and_index():
    long = ArithmeticProblems("train", 1000)
    short = ArithmeticProblems("train", 10)
    assert [long[index] for index in (7, 3, 9)] == [short[index] for index in (7, 3, 9)]
    # Pinned: another machine or Python must make the same problems.
    assert short[0] == {
        "question": "Ann has 9 figs, makes 8, gives 6. How many?",
        "answer": "9+8=17. 17-6=11. #### 11",
    }
    other = ArithmeticProblems("train", 10, seed=1)
    assert [other[index] for index in range(10)] != [short[index] for index in range(10)]


def test_fingerprints_tell_sources_apart():
    sources = [
        ArithmeticProblems("train", 10),
        ArithmeticProblems("train", 11),
        ArithmeticProblems("train", 10, seed=1),
        ArithmeticProblems("test", 10),
        ArithmeticProblems("train", 10, max_operand=9),
    ]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert sources[0].open().fingerprint == ArithmeticProblems("train", 10).fingerprint


def test_difficulty_is_adjustable():
    easy = ArithmeticProblems(
        "train", 500, min_steps=1, max_steps=1, max_operand=5, max_factor=1, num_wordings=1
    )
    questions = [easy[index]["question"] for index in range(500)]
    assert {re.sub(r"\d+", "N", question.split(" has ")[1]) for question in questions} <= {
        f"N {items}, {clause} N. How many?"
        for items in ("pens", "cups", "nuts", "keys", "eggs", "toys", "hats", "figs")
        for clause in ("buys", "sells")
    }
    assert max(int(number) for number in re.findall(r"\d+", " ".join(questions))) == 5
    hard = ArithmeticProblems(
        "train", 100, min_steps=5, max_steps=5, max_operand=500, max_factor=20, max_value=9999
    )
    answers = [hard[index]["answer"] for index in range(100)]
    assert all(answer.count("=") == 5 for answer in answers)
    assert max(int(number) for number in re.findall(r"\d+", " ".join(answers))) > 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "split must be one of .*got 'dev'"),
        ({"num_examples": 0}, "num_examples must be at least 1; got 0"),
        ({"min_steps": 4}, "min_steps must be between 1 and 3; got 4"),
        ({"max_operand": 100}, "max_operand must be between 5 and 99; got 100"),
        ({"max_factor": 0}, "max_factor must be between 1 and 99; got 0"),
        ({"num_wordings": 5}, "num_wordings must be between 1 and 4; got 5"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticProblems(**{"split": "train", "num_examples": 10, **settings})


def test_too_many_held_out_problems_are_refused():
    easy = {"min_steps": 1, "max_steps": 1, "max_operand": 9, "max_factor": 1}
    source = ArithmeticProblems("test", 50, **easy)
    with pytest.raises(ValueError, match=r"num_examples is 50, but only \d distinct"):
        source.open()
    assert len(ArithmeticProblems("train", 2000, **easy).open()) == 2000


def test_solution_and_index_bounds():
    assert solution(7, [("+", 5), ("-", 3)]) == "7+5=12. 12-3=9. #### 9"
    with pytest.raises(IndexError):
        ArithmeticProblems("train", 10)[10]
