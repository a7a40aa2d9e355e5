"""The coin of Algorithm 1 and the schedules of its probability."""

import math

import numpy as np
import pytest

from gkd_jax.objectives import OutputMix, RisingFraction


def tosses(mix, steps, seed=0):
    return [mix.is_on_policy(step, seed=seed) for step in steps]


def test_fraction_one_is_always_and_zero_never_on_policy():
    assert all(tosses(OutputMix(1.0), range(2000)))
    assert not any(tosses(OutputMix(0.0), range(2000)))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75])
def test_frequency_of_on_policy_steps_is_lambda(fraction):
    num = 4000
    for seed in (0, 1):
        frequency = np.mean(tosses(OutputMix(fraction), range(num), seed))
        error = math.sqrt(fraction * (1 - fraction) / num)
        assert abs(frequency - fraction) < 4 * error


@pytest.mark.pitfall(43)
def test_coin_is_a_function_of_seed_and_step_alone():
    mix = OutputMix(0.5)
    whole = tosses(mix, range(40), seed=7)
    assert tosses(OutputMix(0.5), range(23, 40), seed=7) == whole[23:]
    assert tosses(mix, reversed(range(40)), seed=7) == whole[::-1]
    assert tosses(mix, range(40), seed=8) != whole
    # Pinned, so that a run resumes alike under any later version.
    assert "".join("x" if on else "." for on in tosses(mix, range(24), seed=0)) == (
        "xx...xxxxx...x..xxxxx..."
    )


def test_neighbouring_steps_are_independent():
    x = np.array(tosses(OutputMix(0.5), range(4000)), float) - 0.5
    assert abs(np.mean(x[1:] * x[:-1])) / 0.25 < 4 / math.sqrt(4000)


def test_a_larger_fraction_only_adds_on_policy_steps():
    few, many = (tosses(OutputMix(fraction), range(500)) for fraction in (0.3, 0.6))
    assert all(b for a, b in zip(few, many, strict=True) if a)


def test_rising_fraction_is_imitkds_schedule():
    schedule = RisingFraction(base=0.01, num_steps=100)
    assert schedule(0) == 0.0
    assert schedule(50) == pytest.approx(1 - 0.01**0.5)
    assert schedule(100) == pytest.approx(0.99)
    values = [schedule(step) for step in range(101)]
    assert values == sorted(values)
    mix = OutputMix(schedule)
    assert mix.fraction(50) == schedule(50)
    assert not mix.is_on_policy(0, seed=3)
    assert np.mean(tosses(mix, range(80, 101))) > 0.8


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, "0.5", RisingFraction])
def test_fraction_outside_its_range_names_the_setting(fraction):
    with pytest.raises(ValueError, match=r"OutputMix\.student_data_fraction \(lambda\)"):
        OutputMix(fraction)


def test_schedule_outside_its_range_names_the_setting():
    with pytest.raises(ValueError, match=r"OutputMix\.student_data_fraction .* got 2"):
        OutputMix(lambda step: 2.0 * step).is_on_policy(1, seed=0)


def test_schedule_settings_and_seed_are_checked():
    with pytest.raises(ValueError, match=r"RisingFraction\.base"):
        RisingFraction(base=1.0, num_steps=10)
    with pytest.raises(ValueError, match=r"RisingFraction\.num_steps"):
        RisingFraction(base=0.5, num_steps=0)
    with pytest.raises(ValueError, match="seed must be"):
        OutputMix(0.5).is_on_policy(0, seed=-1)
    with pytest.raises(ValueError, match="step must be"):
        OutputMix(0.5).is_on_policy(-1, seed=0)
