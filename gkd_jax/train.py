"""Run mode `train`: the loop. Every step in one order: evaluate, save, fetch, roll out, update.

Evaluating and saving come before the next batch is fetched, so that a saved iterator is never
one batch ahead.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from absl import logging

from gkd_jax import adapters, interruption, prepare, runtime, train_step, writers
from gkd_jax.array_types import Array, Bool, Metrics, Params, PyTree
from gkd_jax.batch import Batch
from gkd_jax.checkpoints.store import CheckpointStore
from gkd_jax.data.pipeline import Dataset
from gkd_jax.evaluate import Evaluator
from gkd_jax.experiment import Experiment
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.objective import Objective
from gkd_jax.optimizers import Optimizer
from gkd_jax.partitioning import Partitioner, process_zero_decides
from gkd_jax.replay import ReplayBuffer
from gkd_jax.reward_scorer import make_scorer, on_policy_objective
from gkd_jax.runtime import Purpose, make_key
from gkd_jax.teacher_tokens import make_reader, measured_objective
from gkd_jax.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run gives to a Python user.

    Attributes:
      state: parameters and optimizer state after the last step.
      scores: values of the last evaluation by name; empty without one.
      seconds: time that the run took in all, over all its parts if it was stopped.
    """

    state: TrainState
    scores: dict[str, float]
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The jitted functions that make and change a state, and the state's shapes and shardings."""

    init: Callable[[Params], TrainState]
    step: train_step.StepFn
    abstract_state: TrainState


# Runs of equal settings, as a study may have them, share what was compiled.
@functools.cache
def jit_step_functions(
    student: LanguageModel,
    teacher: LanguageModel | None,
    objective: Objective,
    optimizer: Optimizer,
    partitioner: Partitioner,
    *,
    num_microbatches: int,
    teacher_part: str | None = None,
    average_decay: float | None = None,
) -> StepFunctions:
    """Jits `train_step.init_train_state` and `train_step.make_train_step`."""
    transformation = optimizer.build()
    init = functools.partial(
        train_step.init_train_state,
        optimizer=transformation,
        with_average=average_decay is not None,
    )
    trained, _ = lora.split(student, student.abstract_params())
    abstract = jax.eval_shape(init, trained)
    param_shardings, _ = lora.split(student, partitioner.param_shardings(student))
    shardings = partitioner.state_shardings(abstract, param_shardings)
    step = train_step.make_train_step(
        student,
        teacher,
        objective,
        transformation,
        num_microbatches=num_microbatches,
        teacher_part=teacher_part,
        average_decay=average_decay,
    )
    return StepFunctions(
        init=jax.jit(init, donate_argnums=0, out_shardings=shardings),
        step=jax.jit(
            partitioner.annotate(step),
            donate_argnums=0,
            out_shardings=(shardings, partitioner.replicated),
        ),
        abstract_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings,
        ),
    )


class Trainer:
    """The jitted functions of a run, the teacher's parameters, and the student's frozen ones."""

    def __init__(self, experiment: Experiment, dataset: Dataset):
        self.experiment = experiment
        self.dataset = dataset
        student, partitioner = experiment.student_model, experiment.partitioner
        teacher = experiment.teacher if experiment.objective.divergence.needs_teacher else None
        self.frozen = runtime.load_frozen(experiment)
        self.frozen_description = adapters.describe_frozen(self.frozen)
        self.teacher_params = None
        if teacher is not None:
            self.teacher_params = runtime.load_teacher(experiment, frozen=self.frozen)
        self._teacher_part = teacher.state_part if teacher else None
        make_functions = functools.partial(
            jit_step_functions,
            student,
            experiment.teacher_model if teacher else None,
            optimizer=experiment.optimizer,
            partitioner=partitioner,
            num_microbatches=experiment.num_microbatches,
            teacher_part=self._teacher_part,
            average_decay=teacher.average_decay if teacher else None,
        )
        vocabulary = dataset.config.vocabulary
        functions = make_functions(measured_objective(experiment, vocabulary))
        # The same function where no reward joins the divergence.
        self.on_policy_step_fn = make_functions(on_policy_objective(experiment)).step
        self._scorer = make_scorer(experiment, dataset)
        self._reader = make_reader(experiment, vocabulary)
        self.abstract_state: PyTree[jax.ShapeDtypeStruct] = functions.abstract_state
        self._init_fn, self.step_fn = functions.init, functions.step
        policy, writer = experiment.rollout.policy, student
        self._teacher_helps = policy is not None
        if policy is not None:
            assert experiment.teacher_model is not None
            writer = policy.combine(student, experiment.teacher_model)
        self.rollout_fn = runtime.jit_rollout(
            experiment.rollout,
            writer,
            partitioner,
            eos_ids=vocabulary.eos_ids,
            pad_id=vocabulary.pad_id,
        )
        self.rollout_metrics_fn = runtime.jit_rollout_metrics(vocabulary.eos_ids)
        self.mix_fn = runtime.jit_mix_outputs(partitioner)
        self.replay: ReplayBuffer | None = None
        if experiment.replay is not None:
            sampled = runtime.abstract_rollout(experiment)
            self.replay = ReplayBuffer(
                experiment.replay, sampled, partitioner, seed=experiment.seed
            )
            self.abstract_state = self.replay.attach_abstract(functions.abstract_state)

    def init_state(self) -> TrainState:
        """The state before the first step, made sharded."""
        return self._init_fn(runtime.init_params(self.experiment))

    def student_params(self, state: TrainState) -> Params:
        """All parameters of the student at this state."""
        return lora.join(state.params, self.frozen)

    def _writer_params(self, state: TrainState) -> Params:
        """Parameters of whoever writes the outputs: the student, or it and the teacher."""
        student_params = self.student_params(state)
        if self._teacher_helps:
            return (student_params, self.teacher_params_of(state))
        return student_params

    def teacher_params_of(self, state: TrainState) -> Params | None:
        """The parameters that teach at this state; None where nobody does."""
        return train_step.teacher_params_of(
            state, self.teacher_params, self._teacher_part, self.frozen
        )

    def step(
        self, state: TrainState, batch: Batch, step: int
    ) -> tuple[TrainState, dict[str, Metrics]]:
        """Makes update number `step` (from 0); returns the state and metrics by group.

        The coin decides whether the outputs are the batch's own or the student's.
        """
        seed, outputs = self.experiment.seed, self.experiment.outputs
        fraction = outputs.fraction(step)
        if outputs.per_example:
            kind = "mixed" if fraction > 0 else "data"
        else:
            kind = "on_policy" if outputs.is_on_policy(step, seed=seed) else "data"
        groups: dict[str, Metrics] = {}
        if kind == "on_policy" and self.replay is not None and self.replay.is_used(step):
            return self._replay_step(state, self.replay, step)
        if kind != "data":
            writer = self._writer_params(state)
            sampled = self.rollout_fn(writer, batch, make_key(seed, Purpose.ROLLOUT, step))
            groups["rollout"] = self.rollout_metrics_fn(sampled)
            sampled = runtime.without_log_probs(sampled)
            if self.replay is not None:
                self.replay.add(sampled, step)
            if self._scorer is not None:
                judge = self.teacher_params_of(state)
                params = self.student_params(state)
                sampled, groups["reward"] = self._scorer(params, judge, batch, sampled)
            if kind == "mixed":
                key = make_key(seed, Purpose.EXAMPLE_COIN, step)
                batch = self.mix_fn(batch, sampled, jnp.float32(fraction), key)
            else:
                batch = sampled
        batch = self._read(batch, groups)
        key = make_key(seed, Purpose.DROPOUT, step)
        step_fn = self.on_policy_step_fn if kind == "on_policy" else self.step_fn
        state, groups[kind] = step_fn(state, self.teacher_params, batch, key, self.frozen)
        return state, groups

    def _replay_step(
        self, state: TrainState, replay: ReplayBuffer, step: int
    ) -> tuple[TrainState, dict[str, Metrics]]:
        groups: dict[str, Metrics] = {}
        batch, staleness = replay.draw(step)
        batch = self._read(batch, groups)
        key = make_key(self.experiment.seed, Purpose.DROPOUT, step)
        state, metrics = self.step_fn(state, self.teacher_params, batch, key, self.frozen)
        groups["replay"] = metrics | {"staleness": staleness}
        return state, groups

    def _read(self, batch: Batch, groups: dict[str, Metrics]) -> Batch:
        """Has a teacher with its own tokens read the outputs; notes how well they agree."""
        if self._reader is not None:
            batch, groups["spans"] = self._reader(batch)
        return batch


def train(experiment: Experiment, *, before_start: Callable[[], None] | None = None) -> TrainResult:
    """Trains, evaluates and saves until `num_steps`; goes on where an earlier run stopped.

    Args:
      experiment: what runs.
      before_start: called when everything was checked and before anything is written.

    Raises:
      gkd_jax.prepare.ConfigurationError: something is wrong with the experiment; lists all.
      FloatingPointError: the loss became NaN or infinite.
      gkd_jax.interruption.InterruptedRunError: SIGTERM came; the run has saved.
    """
    prepared = prepare.prepare(experiment, run_mode="train")
    assert prepared.train_data is not None
    if before_start is not None:
        before_start()
    plan = prepare.describe_plan(experiment, prepared)
    for line in plan.splitlines():
        logging.info("%s", line)
    trainer = Trainer(experiment, prepared.train_data)
    evaluator = None
    if prepared.eval_data is not None:
        evaluator = Evaluator(experiment, prepared.eval_data)
    loop = _Loop(experiment, trainer, evaluator)
    loop.writer.write_text(loop.start_step, "plan", plan)
    try:
        with interruption.Interruption() as signals:
            return loop.run(signals)
    finally:
        loop.close()


# Where the outputs of a step came from, and so the group of its metrics; "mixed" where each example
# tossed a coin of its own, "replay" where the student had sampled them at earlier steps.
OUTPUT_KINDS = ("data", "on_policy", "mixed", "replay")
# How alarms call the outputs of a group of metrics.
_KINDS = {"rollout": "sampled", "outputs": "evaluated"}


class _Loop:
    """The loop's own state: what is due, what was summed, where the data stands."""

    def __init__(self, experiment: Experiment, trainer: Trainer, evaluator: Evaluator | None):
        self.experiment = experiment
        self.trainer = trainer
        self.evaluator = evaluator
        self.store = CheckpointStore(
            experiment.model_dir,
            keep=experiment.checkpoints.keep,
            best_mode=experiment.checkpoints.best_mode,
        )
        self.sums = runtime.MetricSums()
        self.scores: dict[str, float] = {}
        self.scored_step: int | None = None
        self.seconds_before = 0.0
        self.owes_evaluation = False
        self.state, self.start_step, position = self._start()
        layout = experiment.partitioner.data_layout
        self.iterator = trainer.dataset.train_iterator(
            position, process_index=layout.shard_id, process_count=layout.num_shards
        )
        self.writer = writers.default_writer(
            experiment.model_dir, start_step=self.start_step, num_steps=experiment.num_steps
        )
        self.logged_step = self.start_step
        self.start_time = self.logged_time = time.monotonic()

    def _start(self) -> tuple[TrainState, int, int]:
        """Resumes this run, or loads given weights, or starts from scratch."""
        # The step of a saved state is never 0.
        if process_zero_decides(lambda: self.store.latest_step() or 0) == 0:
            return self.trainer.init_state(), 0, 0
        state, host, step = self.store.restore(self.trainer.abstract_state)
        self.trainer.dataset.check_fingerprint(host["data_fingerprint"])
        adapters.check_frozen(self.experiment, self.trainer.frozen_description, host)
        logging.info("resuming after step %d of %d", step, self.experiment.num_steps)
        if self.trainer.replay is not None:
            self.trainer.replay.restore(state.pop("replay"), host["replay"])
            state = TrainState(**state)
        self.scores = host["scores"]
        self.sums = runtime.MetricSums.from_host(host["metric_sums"])
        self.seconds_before = host["seconds"]
        self.owes_evaluation = host.get("owes_evaluation", False)
        if step >= self.experiment.num_steps and not self.owes_evaluation:
            logging.info("nothing to do: set TRAIN_STEPS above %d to train on", step)
        return state, step, host["position"]

    def run(self, signals: interruption.Interruption) -> TrainResult:
        num_steps = self.experiment.num_steps
        for step in range(self.start_step, num_steps + 1):
            if signals.is_due():
                # There is little time: an evaluation is made when the run goes on.
                owes = self._is_evaluation_due(step) and step > self.start_step
                self._save(step, owes_evaluation=owes)
                self.store.wait()
                raise interruption.stopped(step, num_steps)
            # What was done at the step of a restored checkpoint is not done again.
            if step > self.start_step or step == 0 or self.owes_evaluation:
                self.owes_evaluation = False
                self._evaluate_if_due(step)
                self._save_if_due(step)
            if step == num_steps:
                break
            batch = self.experiment.partitioner.shard_batch(next(self.iterator))
            self.state, groups = self.trainer.step(self.state, batch, step)
            for group, metrics in groups.items():
                self.sums.add(group, metrics)
            if (step + 1) % self.experiment.log_period == 0 or step + 1 == num_steps:
                self._log(step + 1)
        self.store.wait()
        return TrainResult(state=self.state, scores=self.scores, seconds=self._seconds())

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.start_time

    def _log(self, step: int) -> None:
        sums, self.sums = self.sums.to_host(), runtime.MetricSums()
        means = runtime.means(sums)
        now = time.monotonic()
        seconds = (now - self.logged_time) / (step - self.logged_step)
        self.logged_step, self.logged_time = step, now
        _check_finite(means, step)
        means["seconds_per_step"] = seconds
        means["learning_rate"] = float(self.experiment.optimizer.schedule(step - 1))
        # Steps on the data and steps on samples are of different length and number.
        tokens = [sums[kind]["target_tokens"] for kind in OUTPUT_KINDS if kind in sums]
        tokens_per_step = sum(total for total, _ in tokens) / sum(weight for _, weight in tokens)
        means["target_tokens_per_second"] = tokens_per_step / seconds
        self.writer.write(step, {f"train/{name}": value for name, value in means.items()})
        self._raise_alarms(means, "rollout", step)

    def _raise_alarms(self, values: Mapping[str, float], group: str, step: int) -> None:
        alarms = self.experiment.alarms
        limits = {"truncated_share": alarms.truncated_share, "repetition": alarms.repetition}
        for name, limit in limits.items():
            value = values.get(f"{group}/{name}", 0.0)
            if value > limit:
                logging.warning(
                    "ALARM at step %d: %s of the %s outputs is %.2f, above Alarms.%s = %.2f: "
                    "outputs collapse or do not end. Look at the predictions; compare the "
                    "end-of-sequence ids of teacher and student, the learning rate and the target "
                    "length.",
                    step, name, _KINDS[group], value, name, limit,
                )  # fmt: skip

    def _is_evaluation_due(self, step: int) -> bool:
        evaluation = self.experiment.evaluation
        if evaluation is None:
            return False
        return step % evaluation.period == 0 or step == self.experiment.num_steps

    def _evaluate_if_due(self, step: int) -> None:
        if self.evaluator is None or not self._is_evaluation_due(step):
            return
        # Steps that are still under way are training's time, all that follows is not.
        jax.block_until_ready(self.state)
        start = time.monotonic()
        teacher_params = self.trainer.teacher_params_of(self.state)
        params = self.trainer.student_params(self.state)
        result = self.evaluator(params, teacher_params, step=step)
        self.scores, self.scored_step = result.values(), step
        self.scores["seconds"] = time.monotonic() - start
        self.writer.write(step, {f"eval/{name}": value for name, value in self.scores.items()})
        self._check_best_metric()
        self._raise_alarms(self.scores, "outputs", step)
        self.logged_time += time.monotonic() - start

    def _check_best_metric(self) -> None:
        name = self.experiment.checkpoints.best_metric
        if name is not None and name not in self.scores and jax.process_index() == 0:
            raise ValueError(
                f"Checkpoints.best_metric is not among the scores of the evaluation; got {name!r}. "
                f"Set it to one of {sorted(self.scores)}."
            )

    def _save_if_due(self, step: int) -> None:
        checkpoints = self.experiment.checkpoints
        due = step > 0 and step % checkpoints.period == 0
        # The best checkpoint can only be kept where it was saved.
        scored = checkpoints.best_metric is not None and step > 0 and self.scored_step == step
        if due or scored or step == self.experiment.num_steps:
            self._save(step)

    def _save(self, step: int, *, owes_evaluation: bool = False) -> None:
        if step == 0:
            return  # A run starts so, without a checkpoint.
        checkpoints = self.experiment.checkpoints
        sums = self.sums.to_host()
        # What was summed before the last line of metrics was checked there.
        _check_finite(runtime.means(sums), step)
        if not _is_finite(self.state):
            raise FloatingPointError(_not_finite("the parameters or the optimizer's state", step))
        metric = None
        if checkpoints.best_metric is not None and self.scored_step == step:
            metric = self.scores.get(checkpoints.best_metric)
        replay = self.trainer.replay
        self.store.save(
            step,
            self.state if replay is None else replay.attach(self.state),
            {
                "position": self.iterator.position,
                "data_fingerprint": self.trainer.dataset.fingerprint,
                "vocabulary": runtime.describe_vocabulary(self.trainer.dataset.config.vocabulary),
                **self.trainer.frozen_description,
                "scores": self.scores,
                "metric_sums": sums,
                "seconds": self._seconds(),
                "owes_evaluation": owes_evaluation,
                **({} if replay is None else {"replay": replay.host_part()}),
            },
            metric=metric,
        )

    def close(self) -> None:
        self.writer.close()
        self.iterator.close()
        self.store.close()


@jax.jit
def _is_finite(tree: PyTree) -> Bool[Array, ""]:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


def _check_finite(means: Mapping[str, float], step: int) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(_not_finite(", ".join(bad), step))


def _not_finite(what: str, step: int) -> str:
    return (
        f"training stopped at step {step}: {what} not finite. The checkpoints saved before are "
        "intact. Lower the learning rate, or set max_grad_norm; an infinite divergence means that "
        "one model gives probability 0 where the other does not."
    )
