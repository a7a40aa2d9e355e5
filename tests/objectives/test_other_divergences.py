"""Divergences of rivals and siblings: float64 NumPy, identities, excluded entries, settings."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_references import OTHERS as ALL
from divergence_references import STRICT_OTHERS as STRICT
from divergence_references import (
    TEMPERATURES,
    np_divergence,
    np_gradient,
    np_softmax,
    np_terms,
    random_case,
)

from gkd_jax.objectives import (
    AlphaDivergence,
    ClippedForwardKL,
    Divergence,
    EntropyAware,
    ForwardKL,
    GeneralizedJSD,
    NegativeLogLikelihood,
    RenyiDivergence,
    ReverseKL,
    SampledReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    VocabularyEntries,
    WeightedSum,
    token_divergence,
)


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_grad(divergence, student, teacher, targets, temperatures=(1.0, 1.0)):
    def total(student):
        values = token_divergence(
            divergence,
            student,
            teacher,
            targets,
            student_temperature=temperatures[0],
            teacher_temperature=temperatures[1],
        )
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values, gradient


@pytest.mark.pitfall(8)
@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_value_and_gradient_match_float64_numpy(divergence, temperatures):
    case = random_case(0)
    values, gradient = value_and_grad(divergence, *case, temperatures)
    expected = np_divergence(divergence, *case, temperatures)
    np.testing.assert_allclose(values, expected, rtol=5e-6, atol=1e-6)
    expected = np_gradient(divergence, *case, temperatures)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-6)


def test_entropy_decides_where_forward_kl_is_added():
    """Both kinds of tokens are in the case above, and the threshold is in nats."""
    student, teacher, targets = random_case(0)
    p = np_softmax(teacher)
    is_high = -(p * np.log(p)).sum(-1) >= 1.5
    assert 0 < is_high.mean() < 1
    without, _ = value_and_grad(ReverseKL(), student, teacher, targets)
    values, _ = value_and_grad(EntropyAware(1.5), student, teacher, targets)
    np.testing.assert_array_equal(values != without, is_high)


def test_clipping_acts_on_some_entries():
    student, teacher, targets = random_case(0)
    terms = np_terms(np_softmax(teacher), np_softmax(student))
    assert 0 < (terms > 0.05).mean() < 1
    clipped, _ = value_and_grad(ClippedForwardKL(0.05), student, teacher, targets)
    whole, _ = value_and_grad(ForwardKL(), student, teacher, targets)
    assert np.all(clipped < whole)
    loose, _ = value_and_grad(ClippedForwardKL(100.0), student, teacher, targets)
    np.testing.assert_allclose(loose, whole, rtol=1e-5)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_slope_is_the_derivative_of_the_term(divergence):
    """Up to a multiple of q, which the gradient does not see."""
    student, teacher, targets = random_case(4)
    is_target = jnp.asarray(targets[..., None] == np.arange(student.shape[-1]))
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    entries = VocabularyEntries(log_q, log_p, is_target)
    by_differentiation = jax.jit(lambda: Divergence.slope(divergence, entries))()
    written = jax.jit(lambda: divergence.slope(entries))()
    multiple = (written - by_differentiation) / np.exp(log_q)
    np.testing.assert_allclose(
        multiple, np.broadcast_to(multiple[..., :1], multiple.shape), rtol=1e-3, atol=1e-3
    )


@pytest.mark.pitfall(6)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 1e4])
@pytest.mark.parametrize("divergence", [*STRICT, ClippedForwardKL()], ids=str)
def test_identical_logits_give_no_loss_and_no_gradient(divergence, scale, temperature):
    logits, _, targets = random_case(9, shape=(2,), vocab=32_000, scale=scale)
    values, gradient = value_and_grad(
        divergence, logits, logits.copy(), targets, (temperature, temperature)
    )
    assert np.max(np.abs(values)) <= 1e-6
    assert np.max(np.abs(gradient)) <= 1e-7


@pytest.mark.parametrize("divergence", STRICT, ids=str)
def test_not_negative_and_exact_on_extreme_logits(divergence):
    student, teacher, targets = random_case(12, scale=100.0)
    values, gradient = value_and_grad(divergence, student, teacher, targets)
    expected = np_divergence(divergence, student, teacher, targets)
    assert np.all(values >= 0)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(gradient))


@pytest.mark.pitfall(27)
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_entries_excluded_by_both_change_nothing(divergence):
    student, teacher, targets = random_case(13, vocab=6)
    bar = np.full((*targets.shape, 2), -np.inf, np.float32)
    expected = value_and_grad(divergence, student, teacher, targets)
    wide = [np.concatenate([x, bar], -1) for x in (student, teacher)]
    values, gradient = value_and_grad(divergence, *wide, targets)
    np.testing.assert_allclose(values, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :6], expected[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[..., 6:], np.zeros_like(bar))


BOUNDED = [
    divergence
    for divergence in STRICT
    if not isinstance(divergence, EntropyAware)
    and not (isinstance(divergence, RenyiDivergence) and divergence.alpha > 1)
]


@pytest.mark.pitfall(27)
@pytest.mark.parametrize("divergence", BOUNDED, ids=str)
def test_entries_excluded_by_one_have_the_mathematical_value(divergence):
    """All of these are finite there, and so are their gradients."""
    with np.errstate(divide="ignore"):
        full, cut = np.log(np.float32([[0.2, 0.3, 0.5]])), np.log(np.float32([[0.4, 0.6, 0.0]]))
    student, teacher = np.concatenate([full, cut]), np.concatenate([cut, full])
    targets = np.zeros(2, np.int32)
    values, gradient = value_and_grad(divergence, student, teacher, targets)
    expected = np_divergence(divergence, student, teacher, targets)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    expected = np_gradient(divergence, student[:1], teacher[:1], targets[:1])
    np.testing.assert_allclose(gradient[:1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.pitfall(27)
def test_entropy_aware_is_finite_where_the_forward_kl_is_not_added():
    """The student excludes an entry; the teacher is sure, and then it is not."""
    with np.errstate(divide="ignore"):
        student = np.log(np.float32([[0.4, 0.6, 0.0], [0.4, 0.6, 0.0]]))
        teacher = np.log(np.float32([[0.98, 0.01, 0.01], [0.3, 0.3, 0.4]]))
    targets = np.zeros(2, np.int32)
    values, gradient = value_and_grad(EntropyAware(0.5), student, teacher, targets)
    reverse, _ = value_and_grad(ReverseKL(), student, teacher, targets)
    np.testing.assert_allclose(values, [reverse[0], np.inf], rtol=1e-6)
    assert np.all(np.isfinite(gradient))


def test_limits_are_the_pure_kls():
    student, teacher, targets = random_case(8, scale=0.5)
    forward = value_and_grad(ForwardKL(), student, teacher, targets)
    reverse = value_and_grad(ReverseKL(), student, teacher, targets)
    for divergence, limit in (
        (SkewForwardKL(1e-3), forward),
        (SkewReverseKL(1e-3), reverse),
        (AlphaDivergence(1 - 1e-3), forward),
        (AlphaDivergence(1e-3), reverse),
        (RenyiDivergence(1 - 1e-3), forward),
        (RenyiDivergence(1 + 1e-3), forward),
    ):
        values, gradient = value_and_grad(divergence, student, teacher, targets)
        np.testing.assert_allclose(values, limit[0], rtol=1e-2)
        np.testing.assert_allclose(gradient, limit[1], rtol=0, atol=1e-2)


@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_skew_divergences_mirror_each_other(alpha):
    student, teacher, targets = random_case(6)
    one, _ = value_and_grad(SkewForwardKL(alpha), student, teacher, targets)
    other, _ = value_and_grad(SkewReverseKL(alpha), teacher, student, targets)
    np.testing.assert_allclose(one, other, rtol=2e-6)
    assert np.all(one <= -math.log(alpha))


def test_renyi_divergence_of_a_hand_computed_pair():
    student, teacher = np.log(np.float32([[1 / 4, 3 / 4]])), np.log(np.float32([[1 / 2, 1 / 2]]))
    for alpha, expected in (
        (2.0, math.log(4 / 3)),  # log(1 + chi squared)
        (0.5, -2 * math.log((1 + math.sqrt(3)) / math.sqrt(8))),  # Bhattacharyya, twice
    ):
        value, gradient = value_and_grad(
            RenyiDivergence(alpha), student, teacher, np.zeros(1, np.int32)
        )
        np.testing.assert_allclose(value, [expected], rtol=1e-6)
        first = 0.5**alpha * 0.25 ** (1 - alpha)
        share = first / (first + 0.5**alpha * 0.75 ** (1 - alpha))
        np.testing.assert_allclose(gradient, [[0.25 - share, share - 0.25]], rtol=1e-6)


def test_renyi_divergence_rises_with_its_order_and_mirrors_itself():
    student, teacher, targets = random_case(6)
    orders = (0.1, 0.3, 0.7, 1.5, 4.0, 20.0)
    values = [value_and_grad(RenyiDivergence(a), student, teacher, targets)[0] for a in orders]
    assert np.all(np.diff(values, axis=0) > 0)
    highest = np.log(np.max(np_softmax(teacher) / np_softmax(student), axis=-1))
    assert np.all(values[-1] < highest)
    # D_a(P || Q) = a / (1 - a) D_(1-a)(Q || P)
    other, _ = value_and_grad(RenyiDivergence(0.7), teacher, student, targets)
    np.testing.assert_allclose(values[1], 0.3 / 0.7 * other, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_renyi_divergence_keeps_its_digits_near_equality(alpha):
    """The logarithm of a sum near 1 would lose them; D is near alpha / 2 sum of q d^2."""
    student, _, targets = random_case(10, vocab=1000)
    teacher = (student + 0.02 * random_case(11, vocab=1000)[0]).astype(np.float32)
    divergence = RenyiDivergence(alpha)
    values, gradient = value_and_grad(divergence, student, teacher, targets)
    expected = np_divergence(divergence, student, teacher, targets)
    assert np.max(expected) < 2e-3 * max(1.0, alpha)
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    q, p = np_softmax(student), np_softmax(teacher)
    product = p**alpha * q ** (1 - alpha)
    expected = q - product / product.sum(-1, keepdims=True)
    assert np.all(np.abs(gradient - expected) <= 2e-6 * q + 1e-9)


@pytest.mark.pitfall(27)
def test_renyi_divergence_is_infinite_where_it_should_be():
    """The student excludes what the teacher says, and disjoint supports; the last two entries,
    which both exclude, change nothing of it."""
    with np.errstate(divide="ignore"):
        student = np.log(np.float32([[0.4, 0.6, 0.0, 0, 0], [0.4, 0.6, 0.0, 0, 0]]))
        teacher = np.log(np.float32([[0.2, 0.3, 0.5, 0, 0], [0.0, 0.0, 1.0, 0, 0]]))
    targets = np.zeros(2, np.int32)
    low, gradient = value_and_grad(RenyiDivergence(0.5), student, teacher, targets)
    np.testing.assert_allclose(low, [-math.log(0.5), np.inf], rtol=1e-6)
    np.testing.assert_allclose(gradient[0], np.zeros(5), atol=1e-7)
    high, _ = value_and_grad(RenyiDivergence(2.0), student, teacher, targets)
    np.testing.assert_array_equal(high, [np.inf, np.inf])


@dataclasses.dataclass(frozen=True)
class UsersRenyi(Divergence):
    """As a user would add it: a term that reads its whole row, and no slope."""

    alpha: float

    def term(self, entries: VocabularyEntries):
        student, teacher = entries.student_probs, entries.teacher_probs
        products = jnp.where(
            (student > 0) & (teacher > 0),
            student * jnp.exp(self.alpha * jnp.where(teacher > 0, entries.log_ratio, 0.0)),
            0.0,
        )
        value = jnp.log(jnp.sum(products, axis=-1, keepdims=True)) / (self.alpha - 1)
        return jnp.where(entries.is_target, value, 0.0)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_default_slope_of_a_term_that_reads_its_whole_row(alpha):
    """And its value all on one entry; also with entries that one side or both exclude."""
    student, teacher, targets = random_case(21)
    targets[:] = 0
    student[..., 3] = teacher[..., 3] = -np.inf
    teacher[0, :, 5] = -np.inf
    expected = value_and_grad(RenyiDivergence(alpha), student, teacher, targets)
    values, gradient = value_and_grad(UsersRenyi(alpha), student, teacher, targets)
    np.testing.assert_allclose(values, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max(axis=-1).min() > 1e-2


@pytest.mark.pitfall(27)
def test_default_slope_with_entries_that_one_side_excludes():
    """`times_log` and `mix` do not let the infinite logarithm of a probability of 0 through."""
    with np.errstate(divide="ignore"):
        full, cut = np.log(np.float32([[0.2, 0.3, 0.5]])), np.log(np.float32([[0.4, 0.6, 0.0]]))
    for student, teacher in ((full, cut), (cut, full)):
        entries = VocabularyEntries(student, teacher, jnp.zeros((1, 3), bool))
        for divergence in (ForwardKL(), ReverseKL(), GeneralizedJSD(0.3), SkewForwardKL(0.1)):
            if np.isinf(divergence.term(entries)).any():
                continue
            slopes = [kind.slope(divergence, entries) for kind in (Divergence, type(divergence))]
            multiple = (slopes[0] - slopes[1])[0, :2] / np.exp(student[0, :2])
            assert np.all(np.isfinite(slopes))
            np.testing.assert_allclose(multiple[0], multiple[1], rtol=1e-5, atol=1e-6)


def test_a_weighted_sum_is_the_sum():
    case = random_case(3)
    parts = (SkewForwardKL(0.1), TotalVariation(), NegativeLogLikelihood())
    values, gradient = value_and_grad(WeightedSum(parts, (1.0, 2.0, 0.5)), *case)
    expected = [np.zeros(values.shape), np.zeros(gradient.shape)]
    for part, weight in zip(parts, (1.0, 2.0, 0.5), strict=True):
        teacher = case[1] if part.needs_teacher else None
        for total, one in zip(
            expected, value_and_grad(part, case[0], teacher, case[2]), strict=True
        ):
            total += weight * np.asarray(one)
    np.testing.assert_allclose(values, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)
    assert not WeightedSum((NegativeLogLikelihood(),), (2.0,)).needs_teacher


@pytest.mark.pitfall(9)
def test_sampled_reverse_kl_is_unbiased():
    """Mean over outputs drawn from the student: the value and the gradient of the reverse KL."""
    student, teacher, _ = random_case(20, shape=(1,), vocab=5, scale=1.0)
    q = np_softmax(student)[0]
    expected, of_expected = value_and_grad(ReverseKL(), student, teacher, np.zeros(1, np.int32))
    every = np.arange(5, dtype=np.int32)
    values, gradient = value_and_grad(
        SampledReverseKL(), np.repeat(student, 5, 0), np.repeat(teacher, 5, 0), every
    )
    np.testing.assert_allclose(q @ values, expected[0], rtol=1e-5)
    np.testing.assert_allclose(q @ np.asarray(gradient), of_expected[0], rtol=1e-4, atol=1e-6)
    # With an advantage that is not detached the gradient of the estimate itself would come out:
    # d log q_y, whose mean is 0.
    advantage = -np.asarray(values)
    by_hand = -advantage[:, None] * (np.eye(5) - q)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkewForwardKL(0.0), r"SkewForwardKL\.alpha .* got 0\.0.*ForwardKL"),
        (lambda: SkewReverseKL(1.0), r"SkewReverseKL\.alpha .* got 1\.0.*ReverseKL"),
        (lambda: AlphaDivergence(math.nan), r"AlphaDivergence\.alpha .* got nan"),
        (lambda: RenyiDivergence(1.0), r"RenyiDivergence\.alpha .* got 1\.0.*ForwardKL"),
        (lambda: RenyiDivergence(0.0), r"RenyiDivergence\.alpha must be above 0.* got 0\.0"),
        (lambda: RenyiDivergence(math.inf), r"RenyiDivergence\.alpha .*finite.* got inf"),
        (lambda: RenyiDivergence("2"), r"RenyiDivergence\.alpha .* got '2'"),
        (lambda: ClippedForwardKL(0.0), r"ClippedForwardKL\.limit must be above 0; got 0\.0"),
        (lambda: EntropyAware(-1.0), r"EntropyAware\.threshold must be not negative; got -1\.0"),
        (lambda: EntropyAware(1.0, 0.0), r"EntropyAware\.forward_weight must be above 0; got 0\.0"),
        (lambda: WeightedSum((), ()), "WeightedSum needs one or more divergences"),
        (lambda: WeightedSum((ForwardKL(),), (1.0, 2.0)), "WeightedSum needs one or more"),
        (lambda: WeightedSum((ForwardKL(),), (-1.0,)), "a weight above 0 for each"),
    ],
)
def test_settings_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
