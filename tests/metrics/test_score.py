import math

import numpy as np
import pytest

from gkd_jax.data.metrics.score import Score, check_pairs, mean_score, share_score


def test_mean_score_is_the_mean_with_the_standard_error_of_the_mean():
    values = [0.1, 0.5, 0.25, 1.0, 0.0]
    score = mean_score(values)
    assert score.value == pytest.approx(37.0)
    assert score.standard_error == pytest.approx(100 * np.std(values, ddof=1) / math.sqrt(5))


def test_one_example_has_no_standard_error():
    assert mean_score([0.5]) == Score(50.0, None)


def test_share_score_is_binomial():
    score = share_score(30, 120)
    assert score.value == 25.0
    assert score.standard_error == pytest.approx(100 * math.sqrt(0.25 * 0.75 / 120))
    assert score.detail == "30 of 120"


def test_scores_print_with_their_error():
    assert str(Score(25.0, 3.953)) == "25.00 ± 3.95"
    assert str(Score(25.0)) == "25.00"


@pytest.mark.parametrize(
    ("references", "predictions", "message"),
    [
        ([["a"]], ["a", "b"], "same length; got 1 and 2"),
        ([], [], "must not be empty"),
        ([["a"], []], ["a", "b"], r"references\[1\] must be a list of at least one string"),
        (["a"], ["a"], r"references\[0\] must be a list"),
    ],
)
def test_what_no_metric_can_score_is_refused(references, predictions, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(references, predictions)
