import time

import pytest

from gkd_jax.data.metrics.calculator import apply_calculator


@pytest.mark.parametrize(
    ("text", "corrected"),
    [
        ("7+5=13", "7+5=12"),
        ("He has 7 + 5 = 13 pens.", "He has 7 + 5 = 12 pens."),
        ("16-7*2=18", "16-7*2=2"),
        ("(16-7)*2 = 2", "(16-7)*2 = 18"),
        ("20 x 3 = 50", "20 x 3 = 60"),
        ("20 \N{MULTIPLICATION SIGN} 3 = 50", "20 \N{MULTIPLICATION SIGN} 3 = 60"),
        ("7 / 2 = 3", "7 / 2 = 3.5"),
        ("$1,000 * 3 = $300", "$1,000 * 3 = $3000"),
        ("-3 + 5 = 8", "-3 + 5 = 2"),
        ("3 - 5 = 2", "3 - 5 = -2"),
        ("3 - 5 = -8", "3 - 5 = -2"),
        ("4 * -3 = 12", "4 * -3 = -12"),
        ("10 / 3 = 4", "10 / 3 = 3.3333333333"),
        ("- 3 + 4 = 8", "- 3 + 4 = 7"),
        ("3 + 4 = 8 + 2 = 9", "3 + 4 = 8 + 2 = 10"),
        # GSM8K's annotations, and the number after them.
        ("48/2 = <<48/2=25>>25 clips", "48/2 = <<48/2=24>>24 clips"),
        # A wrong number is replaced in what follows, ...
        ("7+5=13. 13-3=10. #### 10", "7+5=12. 12-3=9. #### 9"),
        ("7+5=13. The answer is 13.", "7+5=12. The answer is 12."),
        # ... as a whole number only, and until an equation yields it rightly.
        ("7+5=13. 113-3=110.", "7+5=12. 113-3=110."),
        ("7+5=13. 20-7=13. #### 13", "7+5=12. 20-7=13. #### 13"),
    ],
)
def test_right_hand_sides_are_computed(text, corrected):
    assert apply_calculator(text) == corrected


@pytest.mark.parametrize(
    "text",
    [
        "7+5=12. 12-3=9. #### 9",
        "10 / 3 = 3.33",  # Right to the decimals it shows.
        "2/3 = .67",
        "no equation",
        "x + 5 = 13",
        "100 dollars - 30 + 4 = 74",  # The left operand is cut off by its unit.
        "5 apples + 3 apples = 9",
        "20% + 5% = 24%",
        "1/5 = 20%",
        "2 + 1/2 = 2 1/2",
        "17/3 = 5 and 2/3",
        "12 x 1 and 1/4 = 15",
        "3:00 + 2 = 5:00",
        "3:00 + 2 = 5",
        "7 / 0 = 0",
        "(7 + 5 = 13",
        "7 + = 13",
        "= 13",
        "7 + 5 =",
        "1 +",
        "",
        "9" * 5000 + " + 1 = 2",
    ],
)
def test_what_is_right_or_no_sure_equation_is_left_alone(text):
    assert apply_calculator(text) == text


@pytest.mark.parametrize("piece", ["(", "1+", "-", "1 = ", "1+1=3 ", "<<1+1=3>>3 ", "1."])
def test_a_degenerate_output_costs_no_time(piece):
    start = time.process_time()
    apply_calculator(piece * 4000)
    assert time.process_time() - start < 2.0
