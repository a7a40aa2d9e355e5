"""Output layers that are padded to different sizes over one vocabulary."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import small_runs
from divergence_references import ALL_IN_ONE, np_divergence, np_gradient, np_softmax
from jax.sharding import PartitionSpec as P

from gkd_jax.checkpoints.save import save_params
from gkd_jax.data.vocabularies import ByteVocabulary
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.teachers import Teacher, TeacherMixture
from gkd_jax.experiment import Generation, Student
from gkd_jax.models.wrapper import restrict_vocabulary
from gkd_jax.objectives import Objective, Predictions, fused, fused_weighted_loss, weighted_loss
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.run_modes import train
from gkd_jax.run_modes.generate import generate
from gkd_jax.sampling.methods import Sample
from gkd_jax.sampling.teacher_assisted import TeacherMixed

# Of the mesh's eight devices no two have the same entries of both models.
COMMON, STUDENT, TEACHER = 64, 72, 80
B, T, D = 8, 6, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "MIN_CHUNK", 4)
    monkeypatch.setattr(fused, "CHUNK_ENTRIES", 4 * COMMON)


def t5(vocab_size: int, **changes):
    return small_runs.model(D, vocab_size=vocab_size, **changes)


def head_of(kernel):
    return {"decoder": {"logits_dense": {"kernel": kernel}}}


def make_arrays():
    rng = np.random.default_rng(0)
    arrays = {
        "hidden": rng.normal(size=(B, T, D)),
        "head": rng.normal(size=(D, STUDENT)),
        "teacher_hidden": rng.normal(size=(B, T, D)),
        "teacher_head": rng.normal(size=(D, TEACHER)),
        "weights": rng.integers(0, 2, (B, T)) / 20.0,
    }
    # Were the padding in the softmax, it would have most of the probability.
    arrays["head"][:, COMMON:] *= 10
    arrays["teacher_head"][:, COMMON:] *= 10
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return arrays | {"targets": rng.integers(0, COMMON, (B, T)).astype(np.int32)}


def loss_and_gradients(form, arrays):
    """Of the student's hidden states and of its whole head."""

    def loss_fn(trained):
        models = [restrict_vocabulary(t5(size), COMMON) for size in (STUDENT, TEACHER)]
        return form(
            Objective(ALL_IN_ONE),
            student=Predictions(trained[0], head_of(trained[1]), models[0].unembed),
            teacher=Predictions(
                arrays["teacher_hidden"], head_of(arrays["teacher_head"]), models[1].unembed
            ),
            targets=arrays["targets"],
            weights=arrays["weights"],
        )

    return jax.value_and_grad(loss_fn, has_aux=True)((arrays["hidden"], arrays["head"]))


def expected_of(arrays):
    """In float64, over the entries that both have."""
    wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    logits = wide["hidden"] @ wide["head"][:, :COMMON]
    teacher = wide["teacher_hidden"] @ wide["teacher_head"][:, :COMMON]
    arguments = (ALL_IN_ONE, logits, teacher, arrays["targets"])
    per_token = np_divergence(*arguments) * (wide["weights"] > 0)
    of_logits = wide["weights"][..., None] * np_gradient(*arguments)
    of_head = np.zeros_like(wide["head"])
    of_head[:, :COMMON] = np.einsum("btd,btv->dv", wide["hidden"], of_logits)
    of_hidden = of_logits @ wide["head"][:, :COMMON].T
    return ((wide["weights"] * per_token).sum(), per_token), (of_hidden, of_head)


def assert_close(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max())


@pytest.mark.pitfall(36)
@pytest.mark.parametrize("form", [weighted_loss, fused_weighted_loss])
def test_the_loss_is_over_the_entries_that_both_have(form):
    arrays = make_arrays()
    result = jax.jit(functools.partial(loss_and_gradients, form))(arrays)
    assert_close(result, expected_of(arrays))
    of_padding = result[1][1][:, COMMON:]
    np.testing.assert_array_equal(of_padding, np.zeros_like(of_padding))


@pytest.mark.pitfall(36)
@pytest.mark.parametrize("shape", [(4, 2), (1, 8)])
def test_a_vocabulary_over_devices_is_cut_without_being_gathered(shape):
    arrays = make_arrays()
    partitioner = Partitioner(data_parallelism=shape[0], model_parallelism=shape[1])
    specs = dict.fromkeys(arrays, P("data"))
    specs |= dict.fromkeys(("head", "teacher_head"), P(None, "model"))
    shardings = {name: partitioner.sharding(*spec) for name, spec in specs.items()}
    rows = shardings["hidden"]
    step = jax.jit(
        partitioner.annotate(functools.partial(loss_and_gradients, fused_weighted_loss)),
        out_shardings=((partitioner.replicated, rows), (rows, shardings["head"])),
    )
    sharded = jax.device_put(arrays, shardings)
    assert_close(jax.device_get(step(sharded)), expected_of(arrays))
    gathered = re.findall(r"= (.*) all-gather", step.lower(sharded).compile().as_text())
    sizes = f"{COMMON}|{STUDENT}|{TEACHER}"
    assert not [text for text in gathered if re.search(rf"[\[,]({sizes})[\],]", text)]


@pytest.mark.pitfall(36)
@pytest.mark.parametrize("tied", [True, False])
def test_a_restricted_model_is_the_model_given_the_first_entries(tied):
    model = t5(STUDENT, logits_via_embedding=tied)
    assert restrict_vocabulary(model, STUDENT) is restrict_vocabulary(model, TEACHER) is model
    one = restrict_vocabulary(model, COMMON)
    assert (one.vocab_size, one.hidden_size, one.config) == (COMMON, D, model.config)
    kernel = np.random.default_rng(1).normal(size=(D, STUDENT)).astype(np.float32)
    params = {"token_embedder": {"embedding": kernel.T}} | head_of(kernel)
    hidden = np.random.default_rng(2).normal(size=(5, D)).astype(np.float32)
    probs = np_softmax(model.unembed(params, hidden))[:, :COMMON]
    cut = np_softmax(one.unembed(one.head(params), hidden))
    np.testing.assert_allclose(cut, probs / probs.sum(-1, keepdims=True), rtol=1e-5)


def teacher_of(folder, vocab_size: int) -> Teacher:
    model = small_runs.model(small_runs.TEACHER_WIDTH, vocab_size=vocab_size)
    return Teacher(model, str(folder / f"teacher_{vocab_size}"), ByteVocabulary())


def experiment_of(folder, student: int, *teachers: int):
    networks = tuple(teacher_of(folder, size) for size in teachers)
    teacher = networks[0] if len(networks) == 1 else TeacherMixture(networks)
    experiment = small_runs.gkd(
        folder / "run", folder, student=Student(small_runs.model(vocab_size=student)),
        outputs=OutputMix(1.0), num_steps=2, log_period=1,
    )  # fmt: skip
    return dataclasses.replace(experiment, teacher=teacher)


@pytest.mark.pitfall(36)
def test_every_model_of_a_run_has_the_entries_that_all_have(tmp_path):
    for student, teachers, common in (
        (259, (264,), 259), (300, (264,), 264), (300, (264, 270), 264), (260, (264, 270), 260),
        (264, (264,), 264),
    ):  # fmt: skip
        experiment = experiment_of(tmp_path, student, *teachers)
        assert experiment.student_model.vocab_size == common
        assert experiment.teacher_model.vocab_size == common
        assert experiment.student.model.vocab_size == student
        combined = TeacherMixed().combine(experiment.student_model, experiment.teacher_model)
        assert combined.vocab_size == common


@pytest.mark.slow
@pytest.mark.pitfall(36)
@pytest.mark.parametrize("sizes", [(264, 300), (300, 264, 270)], ids=str)
def test_runs_train_evaluate_and_generate(sizes, tmp_path, caplog):
    """On outputs that the student samples: a token that a model has not would give NaN."""
    caplog.set_level("INFO", logger="absl")
    experiment = experiment_of(tmp_path, *sizes)
    for size in sizes[1:]:
        # Random parameters, to which what lies beyond the vocabulary is as likely as any.
        teacher = teacher_of(tmp_path, size)
        save_params(teacher.checkpoint, jax.jit(teacher.model.init)(jax.random.key(size)))
    result = train.train(experiment)
    assert all(np.isfinite(value) for value in result.scores.values())
    assert f"divergences and the training's samples are over the first {min(sizes)}" in caplog.text
    assert ("are not trained" in caplog.text) == (sizes[0] > min(sizes))
    for model in ("student", "teacher"):
        path = tmp_path / f"{model}.jsonl"
        generation = Generation(
            small_runs.data("validation"), str(path), model=model, method=Sample()
        )
        generate(dataclasses.replace(experiment, generation=generation))
        assert len(small_runs.rows(path)) == small_runs.NUM_HELDOUT
