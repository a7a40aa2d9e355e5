"""The train loop: exact resumption, what stops a run, what is written, what compiles how often."""

import collections
import dataclasses
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_runs
from small_runs import Stopped, stop_at

from gkd_jax.checkpoints import manager
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.checkpoints.save import save_params
from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.recipes import arithmetic
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation import train_step
from gkd_jax.distillation.optimizers import Adafactor, AdamW, Constant
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment import Alarms, Checkpoints, Evaluation, Student, prepare
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.objectives.divergence_sums import WeightedSum
from gkd_jax.objectives.divergences import ForwardKL, NegativeLogLikelihood, ReverseKL
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective, final_weights
from gkd_jax.objectives.other_divergences import SampledReverseKL
from gkd_jax.run_modes import train
from gkd_jax.sampling.methods import Greedy, Sample
from gkd_jax.training import jitted_functions, parameters
from gkd_jax.training.trainer import jit_step_functions


def host_part(model_dir, step: int) -> dict:
    with CheckpointManager(model_dir, read_only=True) as manager:
        return small_runs.json.loads((manager.folder(step) / "host.json").read_text())["host"]


@pytest.fixture(scope="module")
def gkd_run(tiny_teacher, tmp_path_factory):
    """A run of 12 steps that nothing interrupts."""
    model_dir = tmp_path_factory.mktemp("gkd") / "run"
    return model_dir, train.train(small_runs.gkd(model_dir, tiny_teacher))


OPTIMIZERS = {
    "adamw": AdamW(Constant(1e-2)),
    "adafactor": Adafactor(Constant(1e-2), min_dim_size_to_factor=8),
}


@pytest.mark.pitfall(43)
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    optimizer, tiny_teacher, gkd_run, tmp_path, monkeypatch
):
    """Stopped at step 8, after the save at 5, the log at 4 and the evaluation at 6."""
    changes = {"optimizer": OPTIMIZERS[optimizer]}
    if optimizer == "adamw":
        whole_dir, whole = gkd_run
    else:
        whole_dir = tmp_path / "whole"
        whole = train.train(small_runs.gkd(whole_dir, tiny_teacher, **changes))
    experiment = small_runs.gkd(tmp_path / "parts", tiny_teacher, **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(Stopped):
            train.train(experiment)
    assert manager.newest_step(experiment.model_dir) == 5
    resumed = train.train(experiment)

    assert int(resumed.state.step) == 12
    small_runs.assert_equal_bits(resumed.state, whole.state)
    written = small_runs.metrics(whole_dir)
    assert small_runs.metrics(tmp_path / "parts") == written
    # The coin fell on both sides within what was resumed.
    groups = {
        name.split("/")[1] for row in written if row["step"] > 5 for name in row if "/" in name
    }
    assert {"data", "on_policy", "rollout"} <= groups
    for step in (6, 12):
        name = f"eval/predictions_{step}.jsonl"
        assert (tmp_path / "parts" / name).read_bytes() == (whole_dir / name).read_bytes()
    one, other = (host_part(folder, 12) for folder in (whole_dir, tmp_path / "parts"))
    assert one["position"] == other["position"] == 12 * small_runs.BATCH_SIZE
    assert one["metric_sums"] == other["metric_sums"]


@pytest.mark.pitfall(43)
def test_the_data_of_a_resumed_run_go_on(tiny_teacher, gkd_run, tmp_path, monkeypatch):
    """The saved position is that of the batches used: none is left out, none comes twice."""
    seen = []
    original = train.Trainer.step

    def step(self, state, batch, step):
        seen.append((step, np.asarray(batch.example_id).tolist()))
        if step == 7:
            raise Stopped
        return original(self, state, batch, step)

    experiment = small_runs.gkd(tmp_path / "run", tiny_teacher)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", step)
        with pytest.raises(Stopped):
            train.train(experiment)
        with pytest.raises(Stopped):
            train.train(experiment)
    size = small_runs.BATCH_SIZE
    assert [number for number, _ in seen] == [*range(8), 5, 6, 7]
    assert all(ids == list(range(step * size, step * size + size)) for step, ids in seen)


@pytest.mark.pitfall(44)
def test_an_iterator_of_other_data_is_refused(tiny_teacher, gkd_run):
    model_dir, _ = gkd_run
    experiment = small_runs.gkd(model_dir, tiny_teacher, num_steps=14)
    other_task = arithmetic(num_train=401, num_heldout=10, min_steps=1, max_steps=1)
    for changed, named in (
        ({"task": other_task}, "num_examples"),
        ({"seed": 1}, "seed"),
        ({"feature_lengths": {"inputs": 40, "targets": 24}}, "feature_lengths"),
    ):
        other = dataclasses.replace(experiment, train_data=small_runs.data(**changed))
        with pytest.raises(ValueError, match="position in the training data cannot") as error:
            train.train(other)
        assert f"{named}: " in str(error.value)


def test_a_finished_run_is_not_trained_again(tiny_teacher, gkd_run, monkeypatch):
    model_dir, result = gkd_run
    stop_at(monkeypatch, 12)
    again = train.train(small_runs.gkd(model_dir, tiny_teacher))
    small_runs.assert_equal_bits(again.state, result.state)
    assert again.scores == result.scores
    assert again.seconds >= host_part(model_dir, 12)["seconds"] > 0


@pytest.mark.pitfall(35)
def test_each_jitted_function_compiles_once(tiny_teacher, tmp_path, caplog):
    """Over steps on data and on samples, two evaluations, and a last batch with fillers."""
    for cached in (
        jit_step_functions,
        jitted_functions.jit_rollout,
        jitted_functions.jit_rollout_metrics,
        jitted_functions.jit_eval_step,
    ):
        cached.cache_clear()
    experiment = small_runs.gkd(tmp_path, tiny_teacher)
    # Another method than the rollout's, so that the two decoders differ.
    evaluation = dataclasses.replace(experiment.evaluation, method=Sample(temperature=0.5))
    experiment = dataclasses.replace(experiment, evaluation=evaluation)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        train.train(experiment)
    messages = [record.getMessage().split() for record in caplog.records]
    compiled = collections.Counter(words[1] for words in messages if words[0] == "Compiling")
    names = {name: compiled[f"jit({name})"] + compiled[name] for name in
             ("train_step", "roll_out", "rollout_metrics", "eval_step")}  # fmt: skip
    assert names == {"train_step": 1, "roll_out": 2, "rollout_metrics": 1, "eval_step": 1}


@pytest.mark.pitfall(45)
def test_a_failing_rollout_stops_the_run(tiny_teacher, tmp_path, monkeypatch):
    """It never goes on with the data's outputs."""
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise RuntimeError("no sampler today")

    jitted_functions.jit_rollout.cache_clear()
    monkeypatch.setattr(jitted_functions, "sample_outputs", fail)
    experiment = small_runs.gkd(tmp_path, tiny_teacher, evaluation=None, outputs=OutputMix(1.0))
    with pytest.raises(RuntimeError, match="no sampler today"):
        train.train(experiment)
    assert len(calls) == 1
    assert manager.newest_step(str(tmp_path)) is None
    jitted_functions.jit_rollout.cache_clear()


@pytest.mark.pitfall(7)
@pytest.mark.slow
@pytest.mark.pitfall(40)
def test_the_configured_objective_is_what_a_run_minimises(tiny_teacher, tmp_path):
    """Loss and gradient of a run's first step, all fields set, against the bare loss function.

    The temperature at which outputs would be sampled is another one, and is not in them.
    """
    objective = Objective(
        ReverseKL(),
        student_temperature=2.0,
        teacher_temperature=0.5,
        reduction="per_token",
        z_loss=1e-2,
    )
    experiment = small_runs.gkd(
        tmp_path,
        tiny_teacher,
        objective=objective,
        outputs=OutputMix(0.0),
        rollout=Rollout(method=Sample(temperature=0.5)),
        student=Student(small_runs.model()),
        evaluation=None,
        num_steps=1,
    )
    train.train(experiment)
    (row,) = small_runs.metrics(tmp_path)

    student, teacher = experiment.student.model, experiment.teacher.model
    params = parameters.init_params(experiment)
    batch = next(Dataset(experiment.train_data).train_iterator())
    weights = final_weights(jnp.asarray(batch.loss_weights), reduction="per_token")
    loss_fn = train_step.make_loss_fn(student, teacher, objective)
    (_, per_token), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, parameters.load_teacher(experiment), batch, weights
    )
    assert row["train/data/loss"] == pytest.approx(float(jnp.sum(weights * per_token)), rel=1e-5)
    assert row["train/data/grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)


@pytest.mark.pitfall(40)
def test_the_configured_teacher_is_used(tiny_teacher, gkd_run, tmp_path):
    other = tmp_path / "other_teacher"
    student = Student(small_runs.model(small_runs.TEACHER_WIDTH))
    train.train(small_runs.sft(other, student=student, seed=5))
    train.train(small_runs.gkd(tmp_path / "run", other))
    first, second = (small_runs.metrics(folder) for folder in (gkd_run[0], tmp_path / "run"))
    names = ("eval/on_data/loss", "train/data/loss", "train/on_policy/loss")
    for rows in zip(first, second, strict=True):
        for name in names:
            if name in rows[0]:
                assert abs(rows[0][name] / rows[1][name] - 1) > 1e-3
    # At step 0 the students are the same, and so are their outputs.
    assert first[0]["eval/outputs/output_length"] == second[0]["eval/outputs/output_length"]


@pytest.mark.pitfall(40)
def test_rollout_settings_reach_the_samples(tiny_teacher, tmp_path):
    """Two samples a prompt double the rows; a shorter target length cuts them."""
    rollout = Rollout(num_samples=2, target_length=8)
    experiment = small_runs.gkd(tmp_path, tiny_teacher, rollout=rollout)
    dataset = Dataset(experiment.train_data)
    trainer = train.Trainer(experiment, dataset)
    batch = experiment.partitioner.shard_batch(next(dataset.train_iterator()))
    params = experiment.student.model.abstract_params()
    sampled = jax.eval_shape(trainer.rollout_fn, params, batch, jax.random.key(0))
    assert sampled.targets.shape == (2 * small_runs.BATCH_SIZE, 8)


@pytest.mark.slow
@pytest.mark.pitfall(42)
def test_dropout_is_on_in_the_student_and_off_in_the_teacher(tiny_teacher, gkd_run, tmp_path):
    """A teacher configured with dropout trains as one without; switched off, it changes steps."""
    whole_dir, whole = gkd_run
    teacher = Teacher(
        small_runs.model(small_runs.TEACHER_WIDTH, dropout_rate=0.5), str(tiny_teacher)
    )
    experiment = small_runs.gkd(tmp_path / "same", tiny_teacher)
    same = train.train(dataclasses.replace(experiment, teacher=teacher))
    small_runs.assert_equal_bits(same.state, whole.state)
    assert small_runs.metrics(tmp_path / "same") == small_runs.metrics(whole_dir)

    off = Student(small_runs.model(dropout_rate=0.0))
    train.train(small_runs.gkd(tmp_path / "off", tiny_teacher, student=off))
    with_dropout, without = (small_runs.metrics(path) for path in (whole_dir, tmp_path / "off"))
    # Evaluation and rollout never drop out: before the first step nothing differs.
    assert with_dropout[0] == without[0]
    line = next(index for index, row in enumerate(without) if row["step"] == 4)
    for name in ("train/data/loss", "train/on_policy/loss"):
        if name in without[line]:
            assert abs(with_dropout[line][name] / without[line][name] - 1) > 1e-4


@pytest.mark.pitfall(50)
def test_steps_at_the_same_prompt_draw_other_noise(tiny_teacher, tmp_path, monkeypatch):
    """And the same step, made again after a resume, draws the same."""
    samples = collections.defaultdict(list)
    original = train.Trainer.step

    def step(self, state, batch, step):
        # The student stays as it is: only the noise of the samples differs.
        def keep(state, teacher_params, batch, key, frozen):
            samples[step].append(np.asarray(batch.targets))
            return state, {"target_tokens": (1.0, 1.0), "non_finite": (0.0, 1.0)}

        self.step_fn = self.on_policy_step_fn = keep
        # The examples' numbers are part of the noise too: here the step alone makes it differ.
        batch = batch.replace(example_id=jnp.arange(small_runs.BATCH_SIZE, dtype=jnp.int32))
        result = original(self, state, batch, step)
        if step == 6 and len(samples[6]) == 1:
            raise Stopped
        return result

    monkeypatch.setattr(train.Trainer, "step", step)
    # One prompt over and over.
    experiment = small_runs.gkd(
        tmp_path,
        tiny_teacher,
        outputs=OutputMix(1.0),
        evaluation=None,
        train_data=small_runs.data(num_examples=1),
        num_steps=8,
    )
    with pytest.raises(Stopped):
        train.train(experiment)
    train.train(experiment)
    rows = np.concatenate([samples[number][0] for number in range(8)])
    assert len(np.unique(rows, axis=0)) == len(rows) == 8 * small_runs.BATCH_SIZE
    for number in (5, 6):
        first, again = samples[number]
        np.testing.assert_array_equal(first, again)


@pytest.mark.pitfall(52)
def test_every_metric_that_is_computed_is_written(gkd_run):
    model_dir, result = gkd_run
    written = {}
    for row in small_runs.rows(model_dir / "metrics.jsonl"):
        written |= row
    step_metrics = ("loss", "loss_per_token", "target_tokens", "grad_norm")
    outputs = ("output_length", "truncated_share", "repetition")
    expected = {
        *(f"train/{group}/{name}" for group in ("data", "on_policy") for name in step_metrics),
        *(f"train/rollout/{name}" for name in outputs),
        *(f"eval/{group}/{name}" for group in ("outputs", "samples") for name in outputs),
        *(f"eval/{name}" for name in result.scores),
        "train/seconds_per_step",
        "train/target_tokens_per_second",
        "plan",
    }
    assert expected <= set(written)
    assert all(math.isfinite(value) for value in written.values() if isinstance(value, float))
    assert list((model_dir / "tensorboard").iterdir())


def test_metrics_are_means_over_the_steps_since_the_last_line(tiny_teacher, tmp_path):
    """Lines of four steps are the weighted means of lines of one."""
    kept = {}
    for period in (1, 4):
        folder = tmp_path / str(period)
        changes = {"log_period": period, "num_steps": 4, "evaluation": None}
        train.train(small_runs.gkd(folder, tiny_teacher, **changes))
        kept[period] = small_runs.metrics(folder)
    (row,) = kept[4]
    for group in ("data", "on_policy"):
        for name in ("loss", "grad_norm", "target_tokens"):
            name = f"train/{group}/{name}"
            values = [line[name] for line in kept[1] if name in line]
            assert row[name] == pytest.approx(np.mean(values), rel=1e-6)


@pytest.mark.pitfall(39)
@pytest.mark.pitfall(47)
def test_alarms_on_outputs_that_collapse_or_never_end(tiny_teacher, tmp_path, caplog):
    """An untrained student's samples do not end; any repetition is above a limit below 0."""
    evaluation = Evaluation(
        small_runs.data("validation"), method=Sample(), num_divergence_examples=0
    )
    changes = {"num_steps": 1, "outputs": OutputMix(1.0), "evaluation": evaluation}
    alarms = Alarms(truncated_share=0.5, repetition=-1.0)
    train.train(small_runs.gkd(tmp_path / "loud", tiny_teacher, alarms=alarms, **changes))
    messages = [record.getMessage() for record in caplog.records if "ALARM" in record.getMessage()]
    for name, group in (
        ("truncated_share", "sampled"),
        ("truncated_share", "evaluated"),
        ("repetition", "sampled"),
        ("repetition", "evaluated"),
    ):
        assert any(f"{name} of the {group} outputs" in message for message in messages), messages
    caplog.clear()
    quiet = Alarms(truncated_share=1.0, repetition=1.0)
    train.train(small_runs.gkd(tmp_path / "quiet", tiny_teacher, alarms=quiet, **changes))
    assert not any("ALARM" in record.getMessage() for record in caplog.records)


@pytest.mark.pitfall(22)
def test_cross_entropy_on_own_samples_is_refused(tiny_teacher, tmp_path):
    mixed = WeightedSum((ForwardKL(), NegativeLogLikelihood()), (1.0, 0.1))
    for fraction, divergence in ((0.5, NegativeLogLikelihood()), (1.0, mixed)):
        experiment = small_runs.gkd(
            tmp_path,
            tiny_teacher,
            objective=Objective(divergence),
            outputs=OutputMix(fraction),
        )
        with pytest.raises(ConfigurationError, match="student_data_fraction to 0"):
            train.train(experiment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fraction", "method"),
    [(0.5, Sample()), (1.0, Sample(temperature=0.7)), (1.0, Sample(top_k=5)), (1.0, Greedy())],
    ids=str,
)
def test_a_sampled_estimate_needs_samples_of_that_distribution(
    tiny_teacher, tmp_path, fraction, method
):
    experiment = small_runs.gkd(
        tmp_path,
        tiny_teacher,
        objective=Objective(SampledReverseKL()),
        outputs=OutputMix(fraction),
        rollout=Rollout(method=method),
    )
    with pytest.raises(ConfigurationError, match="SampledReverseKL is an estimate for outputs"):
        prepare.prepare(experiment, run_mode="train")
    own = dataclasses.replace(experiment, outputs=OutputMix(1.0), rollout=Rollout())
    prepare.prepare(own, run_mode="train")


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_coins_of_examples_at_the_ends_are_those_of_the_batch(tiny_teacher, tmp_path, fraction):
    states = []
    for per_example in (False, True):
        mix = OutputMix(fraction, per_example=per_example)
        experiment = small_runs.gkd(tmp_path / str(per_example), tiny_teacher, outputs=mix)
        states.append(train.train(experiment).state)
    small_runs.assert_equal_bits(*states)


def test_coins_of_examples_need_one_sample_of_full_length(tiny_teacher, tmp_path):
    for rollout in (Rollout(num_samples=2), Rollout(target_length=8)):
        experiment = small_runs.gkd(
            tmp_path, tiny_teacher, outputs=OutputMix(per_example=True), rollout=rollout
        )
        with pytest.raises(ConfigurationError, match="per_example puts one sample in the place"):
            prepare.prepare(experiment, run_mode="train")
    experiment = small_runs.gkd(tmp_path, tiny_teacher, outputs=OutputMix(0.5, per_example=True))
    trainer = train.Trainer(experiment, Dataset(experiment.train_data))
    batch = next(trainer.dataset.train_iterator())
    _, groups, _ = trainer.step(
        trainer.init_state(), experiment.partitioner.shard_batch(batch), step=0
    )
    assert set(groups) == {"rollout", "mixed"}


def test_fine_tuning_reads_no_teacher(tiny_teacher, tmp_path, monkeypatch):
    """One that is configured is not loaded, and the plan says so."""
    monkeypatch.setattr(parameters, "load_teacher", lambda experiment: pytest.fail("loaded"))
    teacher = Teacher(small_runs.model(small_runs.TEACHER_WIDTH), str(tiny_teacher))
    train.train(small_runs.sft(tmp_path, teacher=teacher, num_steps=1))
    assert "not used in training" in (tmp_path / "metrics.jsonl").read_text()


def poison_at(monkeypatch, wanted: int, change) -> None:
    """Changes the state and metrics of one update."""
    original = train.Trainer.step

    def step(self, state, batch, step):
        state, groups, batch = original(self, state, batch, step)
        if step == wanted:
            state, groups = change(state, groups)
        return state, groups, batch

    monkeypatch.setattr(train.Trainer, "step", step)


def nan_parameters(state, groups):
    params = jax.tree.map(lambda leaf: leaf * np.float32("nan"), state.params)
    return dataclasses.replace(state, params=params), groups


def nan_loss(state, groups):
    for metrics in groups.values():
        metrics["loss"] = (metrics["loss"][0] * np.float32("nan"), metrics["loss"][1])
    return state, groups


@pytest.mark.parametrize(
    ("change", "wanted", "kept"),
    [
        (nan_loss, 2, None),  # Before the first save, at 5; logged at 4.
        (nan_loss, 4, None),  # Between the line of metrics at 4 and the save at 5.
        (nan_parameters, 9, 5),  # The last step before a save: no loss has seen them yet.
        (nan_parameters, 11, 10),  # The last of all.
    ],
)
def test_nothing_bad_is_saved(tiny_teacher, tmp_path, monkeypatch, change, wanted, kept):
    poison_at(monkeypatch, wanted, change)
    experiment = small_runs.gkd(tmp_path, tiny_teacher, evaluation=None)
    with pytest.raises(FloatingPointError, match=r"training stopped at step \d+: .* not finite"):
        train.train(experiment)
    assert manager.newest_step(str(tmp_path)) == kept


@pytest.mark.slow
def test_an_exploding_run_stops_with_its_remedy(tiny_teacher, tmp_path):
    """A learning rate at which float32 overflows."""
    experiment = small_runs.sft(
        tmp_path, optimizer=AdamW(Constant(1e38)), checkpoints=Checkpoints(period=1)
    )
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        train.train(experiment)
    assert manager.newest_step(str(tmp_path)) == 1
    saved = parameters.student_to_use(experiment).params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


def test_the_best_checkpoint_is_kept_by_its_own_score(tiny_teacher, tmp_path, monkeypatch):
    """The best is of a step that was evaluated and saved; a score never goes to a later step."""
    scores = iter([0.0, 9.0, 1.0, 2.0])
    original = train.Evaluator.__call__

    def call(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        score = dataclasses.replace(result.scores["gsm8k_accuracy"], value=next(scores))
        return dataclasses.replace(result, scores=result.scores | {"gsm8k_accuracy": score})

    monkeypatch.setattr(train.Evaluator, "__call__", call)
    experiment = small_runs.sft(
        tmp_path,
        num_steps=6,
        evaluation=Evaluation(
            small_runs.data("validation"), period=2, method=Sample(), num_divergence_examples=0
        ),
        checkpoints=Checkpoints(period=1, keep=1, best_metric="gsm8k_accuracy"),
    )
    train.train(experiment)
    with CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.best_step() == 2
        assert manager.all_steps() == [2, 6]
        metrics = {
            step: small_runs.json.loads((manager.folder(step) / "host.json").read_text())["metric"]
            for step in (2, 6)
        }
    assert metrics == {2: 9.0, 6: 2.0}


def test_a_best_metric_that_is_not_measured_is_refused(tiny_teacher, tmp_path):
    checkpoints = Checkpoints(best_metric="blue")
    with pytest.raises(ConfigurationError, match=r"Experiment\.evaluation = None"):
        train.train(small_runs.sft(tmp_path, checkpoints=checkpoints))
    evaluation = Evaluation(
        small_runs.data("validation"), method=Sample(), num_divergence_examples=0
    )
    with pytest.raises(ValueError, match=r"got 'blue'\. Set it to one of .*'gsm8k_accuracy'"):
        train.train(small_runs.sft(tmp_path, checkpoints=checkpoints, evaluation=evaluation))
    assert manager.newest_step(str(tmp_path)) is None


def test_what_was_learnt_is_what_is_saved(tiny_teacher, gkd_run):
    """The last checkpoint holds the state that was returned; the student did move."""
    model_dir, result = gkd_run
    experiment = small_runs.gkd(model_dir, tiny_teacher)
    student = parameters.student_to_use(experiment)
    assert (student.step, student.source) == (12, str(model_dir / "checkpoint_12"))
    small_runs.assert_equal_bits(student.params, result.state.params)
    start = parameters.init_params(experiment)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), start, student.params)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_a_run_on_eight_devices_is_that_on_one(tmp_path):
    """Data 4 x model 2, with samples, microbatches and an evaluation; dropout off."""
    student, teacher = (small_runs.model(width, vocab_size=260) for width in (16, 24))
    save_params(tmp_path / "teacher", teacher.init(jax.random.key(1)))
    for name, partitioner in {
        "one": small_runs.one_device(),
        "eight": Partitioner(model_parallelism=2),
    }.items():
        evaluation = Evaluation(
            small_runs.data("validation", batch_size=8), period=5, method=Sample()
        )
        experiment = small_runs.gkd(
            tmp_path / name,
            tmp_path,
            student=Student(student),
            train_data=small_runs.data(batch_size=8),
            evaluation=evaluation,
            partitioner=partitioner,
            num_steps=5,
            log_period=1,
        )
        own = Teacher(teacher, str(tmp_path / "teacher"))
        train.train(dataclasses.replace(experiment, teacher=own))
    one, eight = (small_runs.metrics(tmp_path / name) for name in ("one", "eight"))
    assert {"train/on_policy/loss", "train/data/loss"} <= {name for row in one for name in row}
    for left, right in zip(one, eight, strict=True):
        assert set(left) == set(right)
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=1e-5), (left["step"], name)
    for step in (0, 5):
        name = f"eval/predictions_{step}.jsonl"
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "eight" / name).read_text()
