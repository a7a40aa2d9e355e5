"""Divergences and their gradients against float64 NumPy, identities and hand-made numbers."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_references import (
    BETAS,
    TEMPERATURES,
    np_divergence,
    np_gradient,
    np_kl,
    np_softmax,
    random_case,
)
from divergence_references import PAPERS as ALL

from gkd_jax.objectives import (
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    NegativeLogLikelihood,
    ReverseKL,
    TotalVariation,
    VocabularyEntries,
    divergence_and_gradient,
    token_divergence,
)

WITH_TEACHER = [divergence for divergence in ALL if divergence.needs_teacher]


@dataclasses.dataclass(frozen=True)
class UsersTotalVariation(TotalVariation):
    """As a user would add one: the term alone, its slope by differentiation."""

    slope = Divergence.slope

    def term(self, entries: VocabularyEntries):
        # 0.5 |p - q| by way of the log-ratio, whose rounding must not decide the slope's sign.
        ratio = entries.log_ratio
        ratio = jnp.where(jnp.abs(ratio) < 1e-5, 0.0, ratio)
        larger = jnp.maximum(entries.teacher_probs, entries.student_probs)
        return -0.5 * larger * jnp.expm1(-jnp.abs(ratio))


def value_and_grad(divergence, student, teacher, targets, temperatures=(1.0, 1.0)):
    """Per-token values and the gradient of their sum, jitted."""
    teacher = teacher if divergence.needs_teacher else None
    return _value_and_grad(divergence, temperatures, student, teacher, targets)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _value_and_grad(divergence, temperatures, student, teacher, targets):
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


def logits_of(*probs):
    """Logits of one token with these probabilities; log 0 = -inf."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, np.float32))[None]


ZERO = np.zeros(1, np.int32)


@pytest.mark.pitfall(1)
@pytest.mark.pitfall(8)
@pytest.mark.pitfall(49)
@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
@pytest.mark.parametrize("divergence", [*ALL, UsersTotalVariation()], ids=str)
def test_value_and_gradient_match_float64_numpy(divergence, temperatures):
    case = random_case(0)
    values, gradient = value_and_grad(divergence, *case, temperatures)
    assert values.dtype == gradient.dtype == jnp.float32
    expected = np_divergence(divergence, *case, temperatures)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-6)
    expected = np_gradient(divergence, *case, temperatures)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def plain(divergence, student, teacher, targets, temperatures):
    """The same from jnp's own parts, differentiated by JAX alone."""
    log_q = jax.nn.log_softmax(student / temperatures[0])
    if isinstance(divergence, NegativeLogLikelihood):
        return -jnp.take_along_axis(log_q, targets[..., None], -1)[..., 0]
    log_p = jax.nn.log_softmax(teacher / temperatures[1])
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if isinstance(divergence, ForwardKL):
        return (p * (log_p - log_q)).sum(-1)
    if isinstance(divergence, ReverseKL):
        return (q * (log_q - log_p)).sum(-1)
    beta = divergence.beta
    log_m = jnp.log(beta * p + (1 - beta) * q)
    value = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)
    return value / (beta * (1 - beta)) if divergence.normalized else value


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_custom_gradient_equals_autodiff_in_float64(divergence):
    temperatures = (0.7, 1.3)
    with jax.enable_x64(True):
        for seed in range(3):
            student, teacher, targets = random_case(seed, scale=1.0 + 2.0 * seed)
            student, teacher = jnp.asarray(student, "float64"), jnp.asarray(teacher, "float64")
            values, gradient = value_and_grad(divergence, student, teacher, targets, temperatures)

            def total(student, teacher=teacher, targets=targets):
                return plain(divergence, student, teacher, targets, temperatures).sum()

            assert values.dtype == jnp.float64
            np.testing.assert_allclose(values.sum(), total(student), rtol=1e-12)
            np.testing.assert_allclose(gradient, jax.grad(total)(student), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_slope_is_the_derivative_of_the_term(divergence):
    student, teacher, targets = random_case(4)
    is_target = targets[..., None] == np.arange(student.shape[-1])
    entries = VocabularyEntries(
        jax.nn.log_softmax(student), jax.nn.log_softmax(teacher), jnp.asarray(is_target)
    )
    by_differentiation = jax.jit(lambda: Divergence.slope(divergence, entries))()
    written = jax.jit(lambda: divergence.slope(entries))()
    np.testing.assert_allclose(written, by_differentiation, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_both_entrances_give_the_same(divergence):
    case = random_case(5)
    values, gradient = value_and_grad(divergence, *case)
    student, teacher, targets = case
    teacher = teacher if divergence.needs_teacher else None
    again, gradient_again = jax.jit(divergence_and_gradient, static_argnums=0)(
        divergence, student, teacher, targets
    )
    np.testing.assert_allclose(values, again, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient, gradient_again, rtol=1e-5, atol=1e-7)


@pytest.mark.pitfall(4)
def test_forward_and_reverse_kl_of_a_hand_computed_pair():
    teacher, student = logits_of(1 / 2, 1 / 2), logits_of(1 / 4, 3 / 4)
    forward, _ = value_and_grad(ForwardKL(), student, teacher, ZERO)
    reverse, _ = value_and_grad(ReverseKL(), student, teacher, ZERO)
    np.testing.assert_allclose(forward, [0.5 * math.log(4 / 3)], rtol=1e-6)  # 0.143841
    np.testing.assert_allclose(reverse, [math.log(27 / 16) / 4], rtol=1e-6)  # 0.130812


@pytest.mark.pitfall(1)
@pytest.mark.pitfall(5)
def test_jsd_mixes_probabilities_with_beta_on_the_teacher():
    teacher, student = logits_of(1 / 2, 1 / 2), logits_of(1 / 4, 3 / 4)
    # M = 0.1 P + 0.9 Q = (0.275, 0.725).
    of_teacher = 0.5 * math.log(0.5 / 0.275) + 0.5 * math.log(0.5 / 0.725)
    of_student = 0.25 * math.log(0.25 / 0.275) + 0.75 * math.log(0.75 / 0.725)
    expected = 0.1 * of_teacher + 0.9 * of_student
    assert expected == pytest.approx(0.0127524, rel=1e-5)
    value, _ = value_and_grad(GeneralizedJSD(0.1), student, teacher, ZERO)
    np.testing.assert_allclose(value, [expected], rtol=1e-5)
    # The geometric mixture and the exchanged weights are measurably other numbers.
    exchanged, _ = value_and_grad(GeneralizedJSD(0.9), student, teacher, ZERO)
    assert abs(exchanged[0] - expected) > 2e-4


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_symmetry(beta):
    student, teacher, targets = random_case(6)
    one, _ = value_and_grad(GeneralizedJSD(beta), student, teacher, targets)
    other, _ = value_and_grad(GeneralizedJSD(1 - beta), teacher, student, targets)
    np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_bounds_reached_on_disjoint_supports(beta):
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    student, teacher, targets = random_case(7, scale=8.0)
    values, _ = value_and_grad(GeneralizedJSD(beta), student, teacher, targets)
    assert np.all(values >= 0)
    assert np.all(values <= bound + 1e-6)
    assert np.max(values) > 0.9 * bound
    teacher, student = logits_of(0.5, 0.5, 0, 0), logits_of(0, 0, 0.2, 0.8)
    for finite in (False, True):
        if finite:
            teacher, student = np.maximum(teacher, -300), np.maximum(student, -300)
        value, gradient = value_and_grad(GeneralizedJSD(beta), student, teacher, ZERO)
        np.testing.assert_allclose(value, [bound], rtol=1e-6)
        np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-7)


@pytest.mark.pitfall(2)
@pytest.mark.pitfall(3)
@pytest.mark.parametrize("small", [1e-3, 1e-4])
def test_jsd_limits_are_the_pure_kls(small):
    # The distance to the limits grows with the ratios of probabilities: mild logits.
    student, teacher, targets = random_case(8, scale=0.5)
    forward, of_forward = value_and_grad(ForwardKL(), student, teacher, targets)
    reverse, of_reverse = value_and_grad(ReverseKL(), student, teacher, targets)
    for beta, limit, of_limit in (
        (small, forward, of_forward),
        (1 - small, reverse, of_reverse),
    ):
        value, gradient = value_and_grad(GeneralizedJSD(beta), student, teacher, targets)
        edge = min(beta, 1 - beta)
        np.testing.assert_allclose(value / edge, limit, rtol=10 * small)
        np.testing.assert_allclose(gradient / edge, of_limit, rtol=0, atol=10 * small)
        normalized = GeneralizedJSD(beta, normalized=True)
        value, gradient = value_and_grad(normalized, student, teacher, targets)
        np.testing.assert_allclose(value, limit, rtol=10 * small)
        np.testing.assert_allclose(gradient, of_limit, rtol=0, atol=10 * small)


@pytest.mark.pitfall(2)
@pytest.mark.pitfall(3)
@pytest.mark.parametrize(
    ("beta", "remedy"), [(0.0, "ForwardKL"), (1, "ReverseKL"), (-0.1, "between 0 and 1"), (1.5, "")]
)
def test_beta_at_the_ends_names_the_kl_to_use(beta, remedy):
    with pytest.raises(ValueError, match=r"GeneralizedJSD\.beta") as error:
        GeneralizedJSD(beta)
    assert remedy in str(error.value)
    assert f"got {beta}" in str(error.value)


@pytest.mark.parametrize("beta", [math.nan, "0.5", None])
def test_beta_that_is_no_number_is_refused(beta):
    with pytest.raises(ValueError, match=r"GeneralizedJSD\.beta"):
        GeneralizedJSD(beta)


@pytest.mark.pitfall(6)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 1e4])
@pytest.mark.parametrize("divergence", [*WITH_TEACHER, UsersTotalVariation()], ids=str)
def test_identical_logits_give_no_loss_and_no_gradient(divergence, scale, temperature):
    logits, _, targets = random_case(9, shape=(2,), vocab=32_000, scale=scale)
    values, gradient = value_and_grad(
        divergence, logits, logits.copy(), targets, (temperature, temperature)
    )
    assert np.max(np.abs(values)) <= 1e-6
    assert np.max(np.abs(gradient)) <= 1e-7


@pytest.mark.parametrize("divergence", WITH_TEACHER, ids=str)
def test_nearly_identical_logits_keep_their_digits(divergence):
    student, _, targets = random_case(10, vocab=1000)
    teacher = (student + 0.02 * random_case(11, vocab=1000)[0]).astype(np.float32)
    values, gradient = value_and_grad(divergence, student, teacher, targets)
    expected = np_divergence(divergence, student, teacher, targets)
    assert np.max(expected) < 2e-3 * (6 if getattr(divergence, "normalized", False) else 1)
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    q = np_softmax(student, 1.0)
    error = np.abs(gradient - np_closed_gradient(divergence, student, teacher))
    assert np.all(error <= 2e-6 * q + 1e-9)


def np_closed_gradient(divergence, student, teacher):
    q, p = np_softmax(student, 1.0), np_softmax(teacher, 1.0)
    if isinstance(divergence, ForwardKL):
        return q - p
    if isinstance(divergence, ReverseKL):
        return q * (np.log(q / p) - np_kl(q, p)[..., None])
    mixture = divergence.beta * p + (1 - divergence.beta) * q
    gradient = (1 - divergence.beta) * q * (np.log(q / mixture) - np_kl(q, mixture)[..., None])
    beta = divergence.beta
    return gradient / (beta * (1 - beta)) if divergence.normalized else gradient


@pytest.mark.pitfall(5)
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_extreme_logits_stay_finite_and_exact(divergence):
    student, teacher, targets = random_case(12, scale=100.0)
    values, gradient = value_and_grad(divergence, student, teacher, targets)
    expected = np_divergence(divergence, student, teacher, targets)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(gradient))
    if divergence.needs_teacher:
        expected = np_closed_gradient(divergence, student, teacher)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.pitfall(27)
@pytest.mark.parametrize("divergence", [*ALL, UsersTotalVariation()], ids=str)
def test_entries_excluded_by_both_change_nothing(divergence):
    student, teacher, targets = random_case(13, vocab=6)
    bar = np.full((*targets.shape, 2), -np.inf, np.float32)
    expected = value_and_grad(divergence, student, teacher, targets)
    values, gradient = value_and_grad(
        divergence,
        np.concatenate([student, bar], -1),
        np.concatenate([teacher, bar], -1),
        targets,
    )
    np.testing.assert_allclose(values, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :6], expected[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[..., 6:], np.zeros_like(bar))


@pytest.mark.pitfall(27)
def test_entries_excluded_by_one_have_the_mathematical_value():
    full, cut = logits_of(0.2, 0.3, 0.5), logits_of(0.4, 0.6, 0.0)
    student = np.concatenate([full, cut, full])
    teacher = np.concatenate([cut, full, full])
    targets = np.zeros(3, np.int32)

    forward, of_forward = value_and_grad(ForwardKL(), student, teacher, targets)
    np.testing.assert_allclose(forward, [math.log(2), np.inf, 0.0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_forward[0], [-0.2, -0.3, 0.5], rtol=1e-5)
    np.testing.assert_allclose(of_forward[1], [0.2, 0.3, -0.5], rtol=1e-5)

    reverse, of_reverse = value_and_grad(ReverseKL(), student, teacher, targets)
    np.testing.assert_allclose(reverse, [np.inf, math.log(2), 0.0], rtol=1e-6, atol=1e-6)
    # Q / P is 2 on both entries that the student has: no direction improves.
    np.testing.assert_allclose(of_reverse[1], np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(of_reverse[2], np.zeros(3), atol=1e-7)

    for beta in BETAS:
        values, gradient = value_and_grad(GeneralizedJSD(beta), student, teacher, targets)
        expected = np_divergence(GeneralizedJSD(beta), student, teacher, targets)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            gradient[0], np_closed_gradient_safe(beta, full[0], cut[0]), rtol=1e-5, atol=1e-6
        )
        assert np.all(np.isfinite(gradient))


def np_closed_gradient_safe(beta, student, teacher):
    q, p = np_softmax(student, 1.0), np_softmax(teacher, 1.0)
    log_ratio = np.log(q / (beta * p + (1 - beta) * q))
    return (1 - beta) * q * (log_ratio - (q * log_ratio).sum())


@pytest.mark.pitfall(27)
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=str)
def test_a_token_that_does_not_count_may_be_infinite(divergence):
    full, cut = logits_of(0.2, 0.3, 0.5), logits_of(0.4, 0.6, 0.0)
    student = np.concatenate([full, cut, logits_of(0.1, 0.1, 0.8)])
    teacher = np.concatenate([cut, full, logits_of(0.3, 0.3, 0.4)])

    @jax.jit
    def loss(student):
        values = token_divergence(divergence, student, teacher, np.zeros(3, np.int32))
        return jnp.where(np.array([False, False, True]), values, 0.0).sum()

    value, gradient = jax.value_and_grad(loss)(student)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient[:2], np.zeros((2, 3)))
    assert np.all(np.isfinite(gradient[2]))
    assert np.any(gradient[2] != 0)


@pytest.mark.parametrize("divergence", WITH_TEACHER, ids=str)
def test_teacher_gets_no_gradient(divergence):
    student, teacher, targets = random_case(14)

    @jax.jit
    def total(teacher):
        return token_divergence(divergence, student, teacher, targets).sum()

    gradient = jax.grad(total)(teacher)
    np.testing.assert_array_equal(gradient, np.zeros_like(teacher))


@pytest.mark.pitfall(7)
@pytest.mark.pitfall(22)
@pytest.mark.parametrize("divergence", WITH_TEACHER, ids=str)
def test_divergence_of_samples_has_no_cross_entropy(divergence):
    student, teacher, targets = random_case(15)
    one = value_and_grad(divergence, student, teacher, targets)
    other = value_and_grad(divergence, student, teacher, (targets + 1) % student.shape[-1])
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.pitfall(14)
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_logits_of_a_position_change_that_token_alone(divergence):
    student, teacher, targets = random_case(16)
    before, _ = value_and_grad(divergence, student, teacher, targets)
    for name in ("student", "teacher"):
        for t in range(targets.shape[1]):
            logits = {"student": student.copy(), "teacher": teacher.copy()}
            logits[name][:, t, 3] += 1.0
            after, _ = value_and_grad(divergence, logits["student"], logits["teacher"], targets)
            changed = np.asarray(after != before)
            expected = np.zeros_like(changed)
            expected[:, t] = name == "student" or divergence.needs_teacher
            np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_bfloat16_logits_are_computed_in_float32(divergence):
    student, teacher, targets = random_case(17, vocab=2000)
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (student, teacher))
    values, gradient = value_and_grad(divergence, student, teacher, targets)
    assert (values.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    wide = [np.asarray(x, np.float32) for x in (student, teacher)]
    np.testing.assert_allclose(values, np_divergence(divergence, *wide, targets), rtol=1e-5)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_backward_pass_keeps_one_array_of_logits(divergence):
    student, teacher, targets = random_case(18)
    teacher = teacher if divergence.needs_teacher else None
    _, backward = jax.vjp(
        lambda s: token_divergence(divergence, s, teacher, targets), jnp.asarray(student)
    )
    kept = [leaf.shape for leaf in jax.tree.leaves(backward) if jnp.size(leaf) >= student.size]
    assert kept == [student.shape]


def test_shapes_and_teachers_that_do_not_fit_are_refused():
    student, teacher, targets = random_case(19)
    with pytest.raises(ValueError, match=r"10 \(teacher\) and 11 \(student\)"):
        token_divergence(ForwardKL(), student, teacher[..., :10], targets)
    with pytest.raises(ValueError, match="one shape"):
        token_divergence(ForwardKL(), student, teacher[:2], targets)
    with pytest.raises(ValueError, match="targets must have the shape"):
        token_divergence(NegativeLogLikelihood(), student, None, targets[:, 1:])
    with pytest.raises(ValueError, match="ReverseKL compares"):
        token_divergence(ReverseKL(), student, None, targets)
    with pytest.raises(ValueError, match="reads no teacher"):
        token_divergence(NegativeLogLikelihood(), student, teacher, targets)
