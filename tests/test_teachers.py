"""Kinds of teacher: mixtures of networks, and the student itself at another time."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_runs

from gkd_jax.checkpoints.save import save_params
from gkd_jax.common.batch import Batch
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation import parameter_sources, train_step
from gkd_jax.distillation.optimizers import AdamW, Constant
from gkd_jax.distillation.parameter_sources import (
    Average,
    FrozenBase,
    Initial,
    Live,
    ParameterSource,
    Restored,
)
from gkd_jax.distillation.teachers import (
    AverageStudent,
    InitialStudent,
    LiveStudent,
    Teacher,
    TeacherMixture,
)
from gkd_jax.experiment import Checkpoints, Evaluation, Generation, Student, prepare
from gkd_jax.experiment.plan import describe_plan, num_params
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.models.ensembles import MixtureModel
from gkd_jax.objectives.divergences import ForwardKL, GeneralizedJSD
from gkd_jax.objectives.objective import Objective, Predictions, final_weights, weighted_loss
from gkd_jax.run_modes import evaluate, generate, study, train
from gkd_jax.run_modes.study import Cell, Study
from gkd_jax.sampling.methods import Sample
from gkd_jax.training import parameters
from gkd_jax.training.trainer import jit_step_functions

OBJECTIVE = Objective(GeneralizedJSD(beta=0.3), teacher_temperature=0.7)
WIDTH = small_runs.TEACHER_WIDTH


def random_batch(vocab_size: int = 259) -> Batch:
    generator = np.random.default_rng(0)
    return Batch(
        inputs=jnp.asarray(generator.integers(3, vocab_size, (4, 6)), jnp.int32),
        inputs_mask=jnp.arange(6)[None] < jnp.array([[6], [3], [4], [5]]),
        targets=jnp.asarray(generator.integers(3, vocab_size, (4, 5)), jnp.int32),
        loss_weights=(jnp.arange(5)[None] < jnp.array([[5], [2], [4], [1]])).astype(jnp.float32),
        example_id=jnp.arange(4),
    )


def params_of(model, seed: int):
    """Three times those at the start of training: distributions far from uniform."""
    return jax.tree.map(lambda leaf: 3 * leaf, jax.jit(model.init)(jax.random.key(seed)))


def taught_by(folder, teacher, **changes):
    """A tiny run with this teacher."""
    return dataclasses.replace(small_runs.gkd(folder, folder, **changes), teacher=teacher)


def probabilities(model, params, batch, temperature: float = 1.0) -> np.ndarray:
    logits = jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))(params, batch)
    logits = np.asarray(logits, np.float64) / temperature
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return probs / probs.sum(-1, keepdims=True)


@pytest.mark.slow
def test_a_mixtures_divergence_is_that_of_the_mixed_distributions():
    """In the plain form, and in chunks as training has it; and it gets no gradient."""
    student, batch = small_runs.model(), random_batch()
    parts = tuple(small_runs.model(width) for width in (16, WIDTH))
    teacher = TeacherMixture(tuple(Teacher(part, "unread") for part in parts), (1, 3))
    model = teacher.model_for(student)
    params, own = params_of(model, 1), params_of(student, 0)

    mixed = sum(
        weight * probabilities(part, one, batch)
        for weight, part, one in zip((0.25, 0.75), parts, params, strict=True)
    )
    p = mixed ** (1 / 0.7)
    p /= p.sum(-1, keepdims=True)
    q = probabilities(student, own, batch)
    m = 0.3 * p + 0.7 * q
    expected = (0.3 * p * np.log(p / m) + 0.7 * q * np.log(q / m)).sum(-1)
    weights = final_weights(batch.loss_weights, reduction="per_sequence")
    expected *= np.asarray(batch.loss_weights)

    loss_fn = train_step.make_loss_fn(student, model, OBJECTIVE)
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
    (loss, fused), (grads, teacher_grads) = grad_fn(own, params, batch, weights)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(teacher_grads))
    assert optax.tree.norm(grads) > 0

    @jax.jit
    def plain_form(own, params):
        student_predictions = Predictions(
            student.hidden_states(own, batch), student.head(own), student.unembed
        )
        teacher_predictions = Predictions(
            model.hidden_states(params, batch), model.head(params), model.unembed
        )
        return weighted_loss(
            OBJECTIVE, student=student_predictions, teacher=teacher_predictions,
            targets=batch.targets, weights=weights,
        )[1]  # fmt: skip

    plain = plain_form(own, params)
    for got in (fused, plain):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert float(loss) == pytest.approx(float(np.sum(weights * expected)), rel=1e-5)


def mixture_of(tiny_teacher, folder) -> TeacherMixture:
    """The tiny teacher, and a bfloat16 network of another width."""
    other = small_runs.model(16, dtype="bfloat16")
    save_params(folder, other.init(jax.random.key(3)))
    return TeacherMixture(
        (Teacher(small_runs.model(WIDTH), str(tiny_teacher)), Teacher(other, str(folder))),
        (3.0, 1.0),
    )


@pytest.mark.slow
def test_a_mixture_trains_evaluates_and_generates(tiny_teacher, tmp_path):
    """Each part in its own compute dtype; named in the plan; unchanged by the run."""
    teacher = mixture_of(tiny_teacher, tmp_path / "other")
    output = str(tmp_path / "outputs.jsonl")
    heldout = small_runs.data("validation")
    experiment = taught_by(
        tmp_path / "run", teacher, num_steps=2,
        evaluation=Evaluation(heldout, method=Sample(), num_divergence_examples=4),
        generation=Generation(heldout, output, model="teacher", method=Sample()),
    )  # fmt: skip
    restored = parameters.load_teacher(experiment)
    assert [{leaf.dtype.name for leaf in jax.tree.leaves(one)} for one in restored] == [
        {"float32"}, {"bfloat16"},
    ]  # fmt: skip
    trained = train.train(experiment)
    plan = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[0])["plan"]
    number = num_params(MixtureModel([part.model for part in teacher.teachers], (1, 1)))
    wanted = f"{number:,} parameters, from 0.75 x {tiny_teacher} + 0.25 x {tmp_path / 'other'}"
    assert f"teacher: {wanted}" in plan

    scores = evaluate.evaluate(experiment).values()
    for name in ("on_data/loss", "on_samples/loss"):
        assert scores[name] == trained.scores[name] > 0
    generate.generate(experiment)
    assert len(small_runs.rows(tmp_path / "outputs.jsonl")) == small_runs.NUM_HELDOUT
    # The file is of these shares: it does not go on with others.
    other = dataclasses.replace(experiment, teacher=dataclasses.replace(teacher, weights=(1, 1)))
    with pytest.raises(ValueError, match="was written by another generation"):
        generate.generate(other)


def self_taught(folder, teacher, start, **changes):
    """A student of the tiny teacher's size that starts as it, with dropout."""
    student = Student(small_runs.model(WIDTH, dropout_rate=0.1), start and str(start))
    settings = dict(num_steps=3, evaluation=None, student=student, checkpoints=Checkpoints())
    return taught_by(folder, teacher, **settings | changes)


@pytest.mark.slow
def test_the_initial_student_is_a_teacher_of_its_checkpoint(tiny_teacher, tmp_path):
    own = self_taught(tmp_path / "own", InitialStudent(), tiny_teacher)
    given = Teacher(own.student.model, str(tiny_teacher))
    first = train.train(own)
    second = train.train(dataclasses.replace(own, teacher=given, model_dir=str(tmp_path / "two")))
    small_runs.assert_equal_bits(first.state, second.state)
    assert small_runs.metrics(tmp_path / "own") == small_runs.metrics(tmp_path / "two")
    # Made again when a run goes on, it is the same.
    stopped = dataclasses.replace(own, model_dir=str(tmp_path / "stopped"))
    train.train(dataclasses.replace(stopped, num_steps=2))
    small_runs.assert_equal_bits(train.train(stopped).state, first.state)
    # Nothing of it is saved.
    names = [
        set(json.loads((tmp_path / name / "checkpoint_3" / "host.json").read_text())["shapes"])
        for name in ("own", "two")
    ]
    assert names[0] == names[1]


def test_the_initial_student_of_a_seed(tmp_path):
    """Without a checkpoint it is drawn again, whatever the run has become; in its own dtype."""
    model = small_runs.model(16, dtype="bfloat16")
    experiment = self_taught(tmp_path, InitialStudent(), None, student=Student(model), seed=5)
    wanted = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), parameters.init_params(experiment))
    small_runs.assert_equal_bits(parameters.load_teacher(experiment), wanted)
    assert "from random parameters of seed 5, as the student starts" in describe_plan(
        experiment, prepare.Prepared()
    )


def test_the_average_follows_the_student_and_resumes(tiny_teacher, tmp_path, monkeypatch):
    """NumPy's recurrence over the parameters of a run; 2 steps, stop, 2 more are 4."""
    recorded = []
    original = train.Trainer.step

    def step(self, state, batch, step):
        recorded.append(jax.device_get((state.params, state.average)))
        return original(self, state, batch, step)

    monkeypatch.setattr(train.Trainer, "step", step)
    heldout = small_runs.data("validation")
    whole = self_taught(
        tmp_path / "whole", AverageStudent(0.75), tiny_teacher, num_steps=4,
        evaluation=Evaluation(heldout, method=Sample(), num_divergence_examples=4),
        generation=Generation(heldout, str(tmp_path / "out"), model="teacher", method=Sample()),
    )  # fmt: skip
    result = train.train(whole)
    recorded.append(jax.device_get((result.state.params, result.state.average)))
    average = jax.tree.map(np.float64, recorded[0][0])
    for params, kept in recorded:
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p.astype(np.float64), average, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
                     kept, average)  # fmt: skip
    start, end = recorded[0][1], recorded[-1][1]
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), start, end)
    assert min(jax.tree.leaves(moved)) > 0

    monkeypatch.undo()
    stopped = dataclasses.replace(whole, model_dir=str(tmp_path / "stopped"))
    train.train(dataclasses.replace(stopped, num_steps=2))
    small_runs.assert_equal_bits(train.train(stopped).state, result.state)

    # What teaches outside training is the average in the newest checkpoint.
    teacher = parameters.teacher_to_use(whole)
    small_runs.assert_equal_bits(teacher.params, result.state.average)
    assert teacher.source.endswith("from " + str(tmp_path / "whole" / "checkpoint_4"))
    scores = evaluate.evaluate(whole).values()
    for name in ("on_data/loss", "on_samples/loss"):
        assert scores[name] == result.scores[name] > 0
    generate.generate(whole)
    by_teacher = small_runs.rows(tmp_path / "out")
    own = dataclasses.replace(whole.generation, model="student", output=str(tmp_path / "own"))
    generate.generate(dataclasses.replace(whole, generation=own))
    log_probs = [[row["log_prob"] for row in rows] for rows in
                 (by_teacher, small_runs.rows(tmp_path / "own"))]  # fmt: skip
    assert log_probs[0] != log_probs[1]


def test_the_average_outside_training(tiny_teacher, tmp_path):
    """Until a run has a checkpoint it is the initial student; a run without one is refused."""
    experiment = self_taught(tmp_path, AverageStudent(0.9), tiny_teacher)
    initial = parameters.init_params(experiment)
    small_runs.assert_equal_bits(parameters.teacher_to_use(experiment).params, initial)
    run_without = dataclasses.replace(
        experiment,
        model_dir=str(tiny_teacher),
        student=Student(small_runs.model(WIDTH)),
        evaluation=Evaluation(small_runs.data("validation")),
    )
    with pytest.raises(ConfigurationError, match=r"holds no average of .*AverageStudent"):
        evaluate.evaluate(run_without)
    with pytest.raises(ValueError, match=r"average/.* is missing.*\(optimizer, teacher\)"):
        train.train(dataclasses.replace(run_without, model_dir=str(tiny_teacher), num_steps=6))


def test_states_without_an_average_have_none():
    params = {"w": jnp.ones(2)}
    optimizer = optax.sgd(0.1)
    state = train_step.init_train_state(params, optimizer)
    assert state.average is None
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert names == [".step", ".params['w']"]
    state = train_step.init_train_state(params, optimizer, with_average=True)
    assert state.average["w"] is not params["w"]
    np.testing.assert_array_equal(state.average["w"], params["w"])


def step_of(source: ParameterSource, *, dropout_rate: float):
    model = small_runs.model(dropout_rate=dropout_rate)
    step = train_step.make_train_step(
        model, model, Objective(ForwardKL()), optax.sgd(0.1),
        sources=(source,),
    )  # fmt: skip
    return jax.jit(step)


@pytest.fixture(scope="module")
def state():
    """A student, and an average that is another."""
    model = small_runs.model()
    made = train_step.init_train_state(params_of(model, 0), optax.sgd(0.1), with_average=True)
    return dataclasses.replace(made, average=params_of(model, 1))


@pytest.mark.slow
def test_the_live_student_teaches_what_dropout_changes(state):
    """Without it nothing: the gradient of equal distributions is exactly 0."""
    batch, key = random_batch(), jax.random.key(7)
    after, metrics = step_of(Live(), dropout_rate=0.0)(state, None, batch, key)
    assert float(metrics["loss"][0]) == float(metrics["grad_norm"][0]) == 0.0
    small_runs.assert_equal_bits(after.params, state.params)

    live, _ = step_of(Live(), dropout_rate=0.1)(state, None, batch, key)
    given, _ = step_of(Restored(), dropout_rate=0.1)(state, state.params, batch, key)
    small_runs.assert_equal_bits(live.params, given.params)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, live.params, state.params)) > 1e-3


def test_the_average_teaches_as_a_network_of_its_parameters_would(state):
    """It is that before the update, gets no gradient, and then follows the student."""
    batch, key = random_batch(), jax.random.key(7)
    own, _ = step_of(Average(0.5), dropout_rate=0.0)(state, None, batch, key)
    given, _ = step_of(Restored(), dropout_rate=0.0)(state, state.average, batch, key)
    small_runs.assert_equal_bits(own.params, given.params)
    small_runs.assert_equal_bits(given.average, state.average)
    jax.tree.map(
        lambda new, old, p: np.testing.assert_allclose(new, (old + p) / 2, rtol=1e-5, atol=1e-6),
        own.average, state.average, own.params,
    )  # fmt: skip


class FromTwoSources(TeacherMixture):
    """The mixture of the student's average and of another network."""

    def parameter_sources(self, student):
        return (Average(0.5), Restored())

    def restricted_models(self, student):
        return (student, self.teachers[0].network)

    def restore_networks(self, network):
        return network(self.teachers[0])


def test_a_teacher_combines_sources(state):
    """Each is resolved within the step: as if both were networks that do not change."""
    student, other = small_runs.model(), small_runs.model(16)
    network = Teacher(other, "unread")
    teacher = FromTwoSources((network, network), (1, 3))
    teacher_params = teacher.restore(
        student, network=lambda one: params_of(one.model, 2), initial_student=pytest.fail
    )
    assert teacher_params[0] is None
    arguments = (student, teacher.model_for(student), OBJECTIVE, optax.sgd(0.1))
    step = jax.jit(
        train_step.make_train_step(*arguments, sources=teacher.parameter_sources(student))
    )
    frozen_step = jax.jit(train_step.make_train_step(*arguments))
    batch, key = random_batch(), jax.random.key(7)
    own, metrics = step(state, teacher_params, batch, key)
    both = (state.average, teacher_params[1])
    given, _ = frozen_step(state, both, batch, key)
    small_runs.assert_equal_bits(own.params, given.params)
    assert float(metrics["loss"][0]) > 0
    # The average has followed: the next step has another teacher.
    after, _ = step(own, teacher_params, batch, key)
    fixed, _ = frozen_step(given, both, batch, key)
    difference = jax.tree.map(jnp.subtract, after.params, fixed.params)
    assert optax.tree.norm(difference) > 1e-6


def test_sources_are_resolved_in_order(state):
    sources = (Initial(), Live(), FrozenBase(), Average(0.5), Restored())
    adapters = dataclasses.replace(state, params="trained", average="averaged")
    got = parameter_sources.resolve(sources, adapters, ("a", None, None, None, "b"), "base")
    wanted = [{"adapters": one, "base": "base"} for one in ("trained", "averaged")]
    assert got == ("a", wanted[0], "base", wanted[1], "b")
    assert parameter_sources.state_fields(sources) == ("params", "average")
    assert parameter_sources.average_decay(sources) == 0.5
    with pytest.raises(ValueError, match=r"decays \[0\.5, 0\.9\]\. Give all of them the same"):
        parameter_sources.average_decay((*sources, Average(0.9)))


TEACHER = Teacher(small_runs.model(), "/nowhere/one")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AverageStudent(0.0), r"AverageStudent\.decay must be above 0 and below 1; got 0"),
        (lambda: AverageStudent(1.0), r"AverageStudent\.decay .* got 1\.0\. .* InitialStudent"),
        (lambda: AverageStudent(float("nan")), r"AverageStudent\.decay .* got nan"),
        (lambda: AverageStudent("0.9"), r"AverageStudent\.decay .* got '0\.9'"),
        (lambda: TeacherMixture(()), r"TeacherMixture\.teachers is empty"),
        (lambda: TeacherMixture((TEACHER, LiveStudent())), r"each be a Teacher; got LiveStudent"),
        (lambda: TeacherMixture((TEACHER,), (1, 2)), r"weights must be 1 positive numbers"),
        (lambda: TeacherMixture((TEACHER,), (0.0,)), r"weights .* got \(0\.0,\)\. Leave out"),
        (lambda: TeacherMixture((TEACHER,), (float("inf"),)), r"weights must be 1 positive"),
        (lambda: taught_by("/run", small_runs.model()), r"must be a teacher"),
        (lambda: taught_by("/run", LiveStudent), r"with brackets"),
    ],
)
def test_wrong_teachers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_part_of_a_mixture_is_checked(tiny_teacher, tmp_path):
    """Files, sizes and vocabularies of all, listed at once."""
    wide = Teacher(small_runs.model(WIDTH, vocab_size=300), "/nowhere/two")
    good = Teacher(small_runs.model(WIDTH), str(tiny_teacher))
    experiment = taught_by(tmp_path, TeacherMixture((TEACHER, wide, good)))
    with pytest.raises(ConfigurationError) as error:
        train.train(experiment)
    problems = error.value.problems
    assert len(problems) == 3
    for path in ("/nowhere/one", "/nowhere/two"):
        assert any(text.startswith(f"Teacher.checkpoint: there is no checkpoint at {path}")
                   for text in problems)  # fmt: skip
    assert any("got 300 (teacher) and 259 (student)" in text for text in problems)


def test_an_average_lies_as_its_parameters_do():
    """On a mesh of data 4 x model 2, with parameters split over both."""
    student = small_runs.model(vocab_size=260)
    functions = jit_step_functions(
        student, student, OBJECTIVE, AdamW(Constant(1e-2)),
        Partitioner(model_parallelism=2, rules="fsdp"),
        num_microbatches=1, sources=(Average(0.9),),
    )  # fmt: skip
    state = functions.abstract_state
    shardings = [jax.tree.map(lambda x: x.sharding, tree) for tree in (state.params, state.average)]
    assert shardings[0] == shardings[1]
    assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings[1]))


def test_each_network_of_a_mixture_is_a_row_of_a_study(tmp_path):
    second = dataclasses.replace(TEACHER, checkpoint="/nowhere/two")
    made = []
    for teacher in (LiveStudent(), TeacherMixture((TEACHER, second))):
        experiment = self_taught(tmp_path, teacher, "/nowhere/start")
        cells = (Cell("run", experiment),)
        test = Evaluation(small_runs.data("validation"))
        made.append(Study(cells, str(tmp_path), test, metric="gsm8k_accuracy"))
    rows = [
        [(name, run.student.initial_checkpoint) for name, run in study._given_networks(one)]
        for one in made
    ]
    given = [("teacher", "/nowhere/one"), ("teacher_2", "/nowhere/two")]
    assert rows == [[("student", "/nowhere/start")], [*given, ("student", "/nowhere/start")]]
    with pytest.raises(ValueError, match="the name 'teacher_2' is taken"):
        dataclasses.replace(made[1], cells=(Cell("teacher_2", experiment),))
    # A cell's trained student is a teacher by itself, in place of any other kind.
    with pytest.raises(ValueError, match="cell 'run' has two teachers"):
        dataclasses.replace(cells[0], teacher_from="other")


def test_a_self_teacher_needs_the_student_outside_training(tmp_path):
    generation = Generation(small_runs.data("validation"), str(tmp_path / "out"), model="teacher")
    for teacher in (AverageStudent(0.9), LiveStudent()):
        experiment = self_taught(tmp_path / "run", teacher, None, generation=generation)
        with pytest.raises(ConfigurationError, match=r"no checkpoint in Experiment\.model_dir"):
            generate.generate(experiment)
