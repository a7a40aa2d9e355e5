"""A generator of multi-step arithmetic word problems with worked solutions.

An example is a pure function of the settings and its index: there are no files, no network and no
state. A problem is assigned to a split by a hash of its numbers and operations, whatever its
wording. Therefore no problem of the test split occurs in training, under any seed or setting.
"""

import dataclasses
import functools
import hashlib
import itertools
import struct
from collections.abc import Iterator

_NAMES = ("Ann", "Tom", "Mia", "Ben", "Zoe", "Sam", "Eva", "Max")
_ITEMS = ("pens", "cups", "nuts", "keys", "eggs", "toys", "hats", "figs")
_STEPS = {
    "+": ("buys {}", "finds {}", "gets {}", "makes {}"),
    "-": ("sells {}", "loses {}", "gives {}", "breaks {}"),
    "*": ("grows it {}-fold", "gets {} times that", "makes it {} times", "has {} times that"),
}
_QUESTION = "How many?"

_Steps = list[tuple[str, int]]

# Problems are divided into tenths by their hash. Maps each split to the numbers of its tenths.
_SHARES = {"test": (0,), "validation": (1,), "train": tuple(range(2, 10))}


@dataclasses.dataclass(frozen=True)
class ArithmeticProblems:
    """Word problems like 'Tom has 7 pens, buys 5, sells 3. How many?'.

    Examples have GSM8K's fields: `question`, and `answer` with every step worked out and the
    result after '####' ('7+5=12. 12-3=9. #### 9'). All texts are ASCII. The problems of held-out
    splits are distinct; training problems are drawn with repetition.

    Attributes:
      split: 'train', 'validation' or 'test'; splits share no problem.
      num_examples: number of examples. Training problems are made on demand and take no memory.
      seed: different seeds draw different problems from the same split.
      min_steps, max_steps: smallest and largest number of operations in a problem.
      max_operand: largest start value, and largest operand of an addition or subtraction.
      max_factor: largest factor of a multiplication; 1 disables multiplication.
      max_value: largest intermediate result; the smallest is 1.
      num_wordings: number of wordings that are used for each operation, 1 to 4.
    """

    split: str
    num_examples: int
    seed: int = 0
    min_steps: int = 2
    max_steps: int = 3
    max_operand: int = 20
    max_factor: int = 4
    max_value: int = 99
    num_wordings: int = 4

    def __post_init__(self) -> None:
        if self.split not in _SHARES:
            raise ValueError(
                f"ArithmeticProblems.split must be one of {sorted(_SHARES)}; got {self.split!r}."
            )
        limits = {
            "num_examples": (1, None),
            "min_steps": (1, self.max_steps),
            "max_steps": (1, 8),
            "max_operand": (5, self.max_value),
            "max_factor": (1, self.max_value),
            "max_value": (10, 10**6),
            "num_wordings": (1, 4),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                wanted = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"ArithmeticProblems.{name} must be {wanted}; got {value}.")

    @property
    def fingerprint(self) -> str:
        """Digest of the settings and of the first examples.

        The examples are included so that changes of the code change the digest.
        """
        first = [self[index] for index in range(min(4, self.num_examples))]
        return hashlib.sha256(repr((self, first)).encode()).hexdigest()

    def open(self) -> "ArithmeticProblems":
        """Returns itself. For a held-out split, all problems are drawn first.

        Raises:
          ValueError: the split has fewer than `num_examples` problems of this difficulty.
        """
        self[0]
        return self

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"index {index} is out of range for {self.num_examples} examples")
        if self.split != "train":
            index = self._distinct[index]
        numbers = self._numbers(index)
        start, steps = self._draw_problem(numbers)
        return {
            "question": self._word(start, steps, numbers),
            "answer": solution(start, steps),
        }

    @functools.cached_property
    def _distinct(self) -> list[int]:
        """For each example of a held-out split, the number of the draw that gives it.

        Draws that repeat a problem are left out.
        """
        seen: set[str] = set()
        kept: list[int] = []
        for draw in itertools.count():
            if len(kept) == self.num_examples:
                return kept
            # Drawing 99% of all problems takes fewer than 5 draws per problem. If more draws than
            # this limit are needed, the split has too few problems.
            if draw > 1000 + 10 * self.num_examples:
                break
            problem = _canonical(*self._draw_problem(self._numbers(draw)))
            if problem not in seen:
                seen.add(problem)
                kept.append(draw)
        raise ValueError(
            f"ArithmeticProblems.num_examples is {self.num_examples}, but only {len(kept)} "
            f"distinct problems of the {self.split} split were found. Set it lower, or "
            "max_operand or max_steps higher."
        )

    def _numbers(self, draw: int) -> Iterator[int]:
        return _numbers(f"{self.seed}/{self.split}/{draw}")

    def _draw_problem(self, numbers: Iterator[int]) -> tuple[int, _Steps]:
        """Draws problems until one is in this split: on average 10 draws for a held-out split."""
        while True:
            num_steps = _between(numbers, self.min_steps, self.max_steps)
            value = start = _between(numbers, 2, self.max_operand)
            steps: _Steps = []
            for _ in range(num_steps):
                operation, operand = self._draw_step(value, numbers)
                steps.append((operation, operand))
                value = apply(operation, value, operand)
            if split_of(start, steps) == self.split:
                return start, steps

    def _draw_step(self, value: int, numbers: Iterator[int]) -> tuple[str, int]:
        highest = {
            "+": min(self.max_operand, self.max_value - value),
            "-": min(self.max_operand, value - 1),
            "*": min(self.max_factor, self.max_value // value),
        }
        operations = [operation for operation, high in highest.items() if high >= 2]
        operation = operations[_between(numbers, 0, len(operations) - 1)]
        return operation, _between(numbers, 2, highest[operation])

    def _word(self, start: int, steps: _Steps, numbers: Iterator[int]) -> str:
        name = _NAMES[_between(numbers, 0, len(_NAMES) - 1)]
        items = _ITEMS[_between(numbers, 0, len(_ITEMS) - 1)]
        clauses = [f"{name} has {start} {items}"]
        for operation, operand in steps:
            wording = _STEPS[operation][_between(numbers, 0, self.num_wordings - 1)]
            clauses.append(wording.format(operand))
        return f"{', '.join(clauses)}. {_QUESTION}"


def apply(operation: str, value: int, operand: int) -> int:
    """Applies one step of a problem to a value."""
    if operation == "+":
        return value + operand
    return value - operand if operation == "-" else value * operand


def solution(start: int, steps: _Steps) -> str:
    """Returns each step as an equation, followed by the result after '####'."""
    value = start
    equations = []
    for operation, operand in steps:
        result = apply(operation, value, operand)
        equations.append(f"{value}{operation}{operand}={result}.")
        value = result
    return " ".join([*equations, f"#### {value}"])


def split_of(start: int, steps: _Steps) -> str:
    """Returns the split of a problem, by a hash of its numbers and operations."""
    digest = hashlib.blake2b(_canonical(start, steps).encode(), digest_size=8).digest()
    tenth = int.from_bytes(digest, "little") % 10
    return next(split for split, tenths in _SHARES.items() if tenth in tenths)


def _canonical(start: int, steps: _Steps) -> str:
    """Returns a text that identifies a problem.

    If the first operation is commutative, its operands are sorted: 3 + 5 is the same problem as
    5 + 3.
    """
    (operation, operand), *others = steps
    if operation in "+*":
        start, operand = sorted((start, operand))
    return repr((start, operation, operand, others))


def _numbers(key: str) -> Iterator[int]:
    """Yields an endless sequence of pseudorandom 16-bit numbers.

    The sequence depends only on the key, not on the versions of libraries.
    """
    block = 0
    while True:
        yield from struct.unpack("<32H", hashlib.blake2b(f"{key}/{block}".encode()).digest())
        block += 1


def _between(numbers: Iterator[int], low: int, high: int) -> int:
    # The bias of the remainder is below (high - low) / 65536.
    return low + next(numbers) % (high - low + 1)
