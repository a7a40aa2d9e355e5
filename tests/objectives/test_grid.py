"""The loss against float64 NumPy: every divergence, form, precision and output layer.

Values and all gradients: of hidden states, of the output layer and of its bias. With masks, with a
sequence that is masked altogether, and with entries that both models exclude.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_references import (
    ALL_IN_ONE,
    EVERY,
    np_divergence,
    np_gradient,
    prefix_weights,
)

from gkd_jax.common.batch import Batch
from gkd_jax.distillation import train_step
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives import (
    ForwardKL,
    Objective,
    Predictions,
    ReverseKL,
    final_weights,
    fused,
    fused_weighted_loss,
    weighted_loss,
)
from gkd_jax.training import non_finite

B, T, D, V = 4, 5, 8, 12
EXCLUDED = [7, 11]
LENGTHS = (5, 2, 0, 3)
FORMS = {"plain": weighted_loss, "fused": fused_weighted_loss}


@dataclasses.dataclass(frozen=True)
class OutputLayer:
    """cap tanh((scale hidden kernel + bias) / cap), as a model has it and in NumPy."""

    scale: float = 1.0
    cap: float = math.inf
    tied: bool | None = None

    @property
    def t5(self) -> T5:
        sizes = dict.fromkeys(
            ("num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim", "mlp_dim"), 1
        )
        return T5(T5Config(V, D, logits_via_embedding=bool(self.tied), **sizes))

    def head(self, kernel, bias):
        if self.tied is None:
            return {"kernel": kernel, "bias": bias}
        if self.tied:
            return {"token_embedder": {"embedding": kernel.T}}
        return {"decoder": {"logits_dense": {"kernel": kernel}}}

    def unembed(self, head, hidden):
        """The model's own code for T5."""
        if self.tied is not None:
            return self.t5.unembed(head, hidden)
        kernel, bias = head["kernel"], head["bias"].astype(jnp.float32)
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        logits = self.scale * logits + jnp.expand_dims(bias, tuple(range(hidden.ndim - 1)))
        return self.cap * jnp.tanh(logits / self.cap)

    def np_logits(self, kernel, bias, hidden):
        """The logits and their slope in what is inside of tanh, float64."""
        logits = self.scale * (hidden @ kernel)
        if self.tied is not None:
            return logits, np.ones_like(logits)
        tanh = np.tanh((logits + bias) / self.cap)
        return self.cap * tanh, 1 - tanh**2


LAYERS = {
    "T5 1.0": OutputLayer(scale=1 / math.sqrt(D), tied=True),
    "T5 1.1": OutputLayer(tied=False),
    "soft-capped": OutputLayer(scale=0.7, cap=3.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "MIN_CHUNK", 4)
    monkeypatch.setattr(fused, "CHUNK_ENTRIES", 4 * V)


def excluded_entries(*numbers):
    bars = np.zeros(V, np.float32)
    bars[list(numbers)] = -np.inf
    return bars


def make_case(dtype):
    """Float64 arrays that `dtype` holds exactly: of the teacher all, of the student what it is
    in training, where parameters are float32."""
    rng = np.random.default_rng(0)

    def rounded(*shape, to=dtype):
        return np.asarray(jnp.asarray(rng.normal(size=shape), to), np.float64)

    return types.SimpleNamespace(
        hidden=rounded(B, T, D),
        kernel=rounded(D, V, to=jnp.float32),
        bias=rounded(V, to=jnp.float32),
        teacher_hidden=rounded(B, T, D),
        teacher_kernel=rounded(D, V),
        teacher_bias=rounded(V),
        targets=rng.integers(0, min(EXCLUDED), (B, T)).astype(np.int32),
        weights=np.asarray(
            final_weights(jnp.asarray(prefix_weights(LENGTHS, T)), reduction="per_sequence")
        ),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))
def run(form, objective, layer, student, teacher, bars, targets, weights):
    """Loss, values per token and the gradients of the student's hidden states and head."""

    def unembed(of, head, hidden):
        logits = layer.unembed(head, hidden)
        return logits + np.reshape(bars[of], (1,) * (hidden.ndim - 1) + (V,))

    def loss_fn(student):
        return FORMS[form](
            objective,
            student=Predictions(*student, functools.partial(unembed, 0)),
            teacher=Predictions(*teacher, functools.partial(unembed, 1)) if teacher else None,
            targets=targets,
            weights=weights,
        )

    return jax.value_and_grad(loss_fn, has_aux=True)(student)


def run_case(form, objective, layer, case, dtype, bars):
    student = (
        jnp.asarray(case.hidden, dtype),
        jax.tree.map(jnp.float32, layer.head(case.kernel, case.bias)),
    )
    teacher = None
    if objective.divergence.needs_teacher:
        teacher = jax.tree.map(
            lambda x: jnp.asarray(x, dtype),
            (case.teacher_hidden, layer.head(case.teacher_kernel, case.teacher_bias)),
        )
    bars = tuple(tuple(one.tolist()) for one in bars)
    return run(form, objective, layer, student, teacher, bars, case.targets, case.weights)


def np_run(objective, layer, case, bars):
    """The same in float64."""
    logits, slope = layer.np_logits(case.kernel, case.bias, case.hidden)
    teacher, _ = layer.np_logits(case.teacher_kernel, case.teacher_bias, case.teacher_hidden)
    arguments = (
        objective.divergence, logits + bars[0], teacher + bars[1], case.targets,
        (objective.student_temperature, objective.teacher_temperature),
    )  # fmt: skip
    per_token = np.where(case.weights > 0, np_divergence(*arguments), 0.0)
    of_inside = slope * case.weights[..., None] * np_gradient(*arguments)
    of_hidden = layer.scale * of_inside @ case.kernel.T
    of_kernel = layer.scale * np.einsum("btd,btv->dv", case.hidden, of_inside)
    head = layer.head(of_kernel, of_inside.sum((0, 1)))
    return ((case.weights * per_token).sum(), per_token), (of_hidden, head)


def check(divergence, layer, dtype):
    objective = Objective(divergence, student_temperature=1.3)
    if divergence.needs_teacher:
        objective = dataclasses.replace(objective, teacher_temperature=0.8)
    case = make_case(dtype)
    bars = (excluded_entries(*EXCLUDED),) * 2
    expected = np_run(objective, layer, case, bars)
    # Of the loss, a sum, the size is that of its terms: those of a clipped divergence cancel.
    of_loss = np.sum(case.weights * np.abs(expected[0][1]))
    sizes = [of_loss, *(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)[1:])]
    results = {form: run_case(form, objective, layer, case, dtype, bars) for form in FORMS}
    for result in results.values():
        of_hidden = result[1][0]
        assert of_hidden.dtype == dtype
        leaves = (jax.tree.leaves(result), jax.tree.leaves(expected), sizes)
        for one, other, size in zip(*leaves, strict=True):
            # What is returned as bfloat16 is rounded to it once, by at most 2^-8 of the entry.
            rounding = 2.0**-8 if one.dtype == jnp.bfloat16 else 0.0
            np.testing.assert_allclose(np.asarray(one, np.float64), other, rounding, 1e-5 * size)
        np.testing.assert_array_equal(result[0][1][2], np.zeros(T))
        np.testing.assert_array_equal(of_hidden[2], np.zeros((T, D)))
    values = [results[form][0][0] for form in ("fused", "plain")]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-6 * of_loss)


@pytest.mark.pitfall(12)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_all_divergences_at_once(layer, dtype):
    """A sum of every one, each with a weight that shows."""
    check(ALL_IN_ONE, LAYERS[layer], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_each_divergence(divergence, layer, dtype):
    check(divergence, LAYERS[layer], dtype)


def test_layers_are_what_they_are_called():
    """The cap bends the logits, and scale and bias move them: leaving one out would show."""
    case = make_case(jnp.float32)
    layer = LAYERS["soft-capped"]
    whole, slope = layer.np_logits(case.kernel, case.bias, case.hidden)
    assert slope.min() < 0.1
    for change in ({"scale": 1.0}, {"cap": 1e6}):
        other, _ = dataclasses.replace(layer, **change).np_logits(
            case.kernel, case.bias, case.hidden
        )
        assert np.abs(other - whole).max() > 0.5
    assert LAYERS["T5 1.0"].t5.config.logits_via_embedding
    assert not LAYERS["T5 1.1"].t5.config.logits_via_embedding


@pytest.mark.pitfall(27)
@pytest.mark.parametrize("form", FORMS)
def test_what_one_side_alone_excludes(form):
    """The mathematical value, and where that is infinite training stops and says so."""
    case, layer = make_case(jnp.float32), LAYERS["T5 1.1"]
    batch = Batch(
        inputs=case.targets,
        inputs_mask=case.targets >= 0,
        targets=case.targets,
        loss_weights=jnp.asarray(case.weights > 0, jnp.float32),
        example_id=jnp.arange(B),
    )
    for divergence, whose in ((ForwardKL(), 0), (ReverseKL(), 1)):
        bars = [excluded_entries(), excluded_entries()]
        bars[whose] = excluded_entries(*EXCLUDED)
        objective = Objective(divergence)
        (loss, per_token), _ = run_case(form, objective, layer, case, jnp.float32, bars)
        with np.errstate(invalid="ignore"):
            (_, expected), _ = np_run(objective, layer, case, bars)
        assert loss == math.inf
        np.testing.assert_array_equal(np.isinf(expected), case.weights > 0)
        np.testing.assert_array_equal(per_token, expected)
        metrics = train_step.loss_metrics(per_token, batch, case.weights)
        means = {name: float(total / weight) for name, (total, weight) in metrics.items()}
        with pytest.raises(FloatingPointError, match=r"step 7: loss.* gives probability 0"):
            non_finite.check_means(means, 7)
