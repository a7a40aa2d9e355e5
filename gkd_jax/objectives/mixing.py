"""GKD's Algorithm 1: decides whether a step trains on the data's or the student's outputs.

"On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD,
arXiv 2306.13649).
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

# Separates the random numbers of `OutputMix` from other uses of the same seed.
_COIN_STREAM = 0x6B64636F696E


class FractionSchedule(Protocol):
    """A schedule of lambda, the fraction of steps that train on the student's own outputs."""

    def __call__(self, step: int) -> float:
        """Returns the probability that step `step` trains on the student's own outputs."""
        ...


@dataclasses.dataclass(frozen=True)
class RisingFraction:
    """A fraction that rises from 0 with the step,

        lambda = 1 - base^(step / num_steps).

    This is the schedule of "Autoregressive Knowledge Distillation through Imitation Learning"
    (ImitKD, arXiv 2009.07253). Training begins with the data's outputs alone; at the end the
    fraction is 1 - base.

    Attributes:
      base: r in the paper, in (0, 1); 1 - base is the fraction at `num_steps`.
      num_steps: number of training steps, I in the paper.

    Raises:
      ValueError: a setting is outside its range.

    Examples:
      >>> from gkd_jax import objectives
      >>> schedule = objectives.RisingFraction(base=0.01, num_steps=1000)
      >>> print(" ".join(f"{schedule(step):.2f}" for step in (0, 100, 500, 1000)))
      0.00 0.37 0.90 0.99
    """

    base: float
    num_steps: int

    def __post_init__(self) -> None:
        if not (isinstance(self.base, (int, float)) and 0.0 < self.base < 1.0):
            raise ValueError(
                "RisingFraction.base must be between 0 and 1, ends excluded; got "
                f"{self.base!r}. Set it to 1 minus the fraction wanted at the end."
            )
        if not (isinstance(self.num_steps, int) and self.num_steps >= 1):
            raise ValueError(
                f"RisingFraction.num_steps must be a whole number from 1 on; got "
                f"{self.num_steps!r}. Set it to the number of training steps."
            )

    def __call__(self, step: int) -> float:
        """1 - base^(step / num_steps)."""
        return -math.expm1(math.log(self.base) * step / self.num_steps)


@dataclasses.dataclass(frozen=True)
class OutputMix:
    """Decides for each step whether its batch is trained on the student's own outputs.

    Algorithm 1 of GKD: draw u ~ U(0, 1); if u <= lambda, the outputs of the whole batch are sampled
    from the student, otherwise they come from the data.

    Attributes:
      student_data_fraction: lambda, a number in [0, 1] or a schedule. With 1 every step trains on
        the student's outputs; with 0 no step does.
      per_example: whether a separate coin is tossed for each example of a batch. The loss then has
        the same expectation and a lower variance, but outputs are sampled at every step.

    Raises:
      ValueError: the fraction is a number outside [0, 1].

    Examples:
      The coin of a step depends on the seed and the step alone:

      >>> from gkd_jax import objectives
      >>> mix = objectives.OutputMix(student_data_fraction=0.5)
      >>> [mix.is_on_policy(step, seed=0) for step in range(4)]
      [True, True, False, False]
    """

    student_data_fraction: float | FractionSchedule = 0.5
    per_example: bool = False

    def __post_init__(self) -> None:
        # If the brackets after a schedule's name are missing, gin passes the class itself, which is
        # callable too.
        is_schedule = callable(self.student_data_fraction)
        if not is_schedule or isinstance(self.student_data_fraction, type):
            _check_fraction(self.student_data_fraction)

    def fraction(self, step: int) -> float:
        """Returns lambda at a step.

        Raises:
          ValueError: a schedule returned a value outside [0, 1].
        """
        if callable(self.student_data_fraction):
            return _check_fraction(self.student_data_fraction(step))
        return float(self.student_data_fraction)

    def is_on_policy(self, step: int, *, seed: int) -> bool:
        """Decides on the host whether a step trains on the student's own outputs.

        The result depends on (seed, step) alone, so all hosts agree without communication, and a
        resumed run gets the same result at each step.

        Args:
          step: number of the training step, from 0.
          seed: the run's seed, not negative.

        Returns:
          True if the outputs of the batch are to be sampled from the student.

        Raises:
          ValueError: the seed or the step is negative.
        """
        # 1 - random() is in (0, 1]. The result is therefore never True for a fraction of 0, and
        # always True for a fraction of 1.
        coin = 1.0 - host_generator(_COIN_STREAM, seed=seed, step=step).random()
        return bool(coin <= self.fraction(step))


def host_generator(stream: int, *, seed: int, step: int, use: int = 0) -> np.random.Generator:
    """Returns a host random generator that is determined by (stream, seed, step, use).

    All hosts draw the same numbers without communication, and so does a resumed run.

    Args:
      stream: constant that identifies the purpose. Each purpose gets independent numbers.
      seed: the run's seed.
      step: number of the training step, from 0.
      use: index of the generator, if one purpose needs several generators at one step.

    Raises:
      ValueError: the seed or the step is negative.
    """
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 2**63:
            raise ValueError(
                f"{name} must be between 0 and 2**63 - 1; got {value}. Set {name} to such a number."
            )
    key = np.array([seed, stream], dtype=np.uint64)
    # Philox counts the draws of a generator in the lowest word. The other words differ between
    # generators, so that their random numbers never overlap.
    counter = np.array([0, step, use, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _check_fraction(value: object) -> float:
    if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(
            "OutputMix.student_data_fraction (lambda) must be a number from 0 (the data's outputs "
            f"only) to 1 (the student's only), or a schedule; got {value!r}. Set "
            "OutputMix.student_data_fraction inside that range (a schedule in gin: "
            "@RisingFraction() with brackets)."
        )
    return float(value)
