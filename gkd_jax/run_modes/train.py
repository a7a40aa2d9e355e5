"""Run mode `train`: the training loop.

Every step has the same order: evaluate, save, fetch a batch, roll out, update. Evaluation and
saving come before the next batch is fetched, so that a saved data position is never one
batch ahead of the saved parameters.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging

from gkd_jax.checkpoints import layout
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.data import vocabularies
from gkd_jax.devices.processes import process_zero_decides
from gkd_jax.distillation.train_state import TrainState
from gkd_jax.experiment import prepare
from gkd_jax.experiment.checks import adapters
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.plan import describe_plan
from gkd_jax.run_modes.evaluate import Evaluator
from gkd_jax.training import interruption, metric_sums, non_finite, watchdog
from gkd_jax.training.metrics_log import MetricsLog
from gkd_jax.training.non_finite import NonFiniteSteps
from gkd_jax.training.profiling import Profiler
from gkd_jax.training.step_kinds import StepKind
from gkd_jax.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a finished run.

    Attributes:
      state: parameters and optimizer state after the last step.
      scores: values of the last evaluation by name; empty if there was none.
      seconds: total time of the run, including the time before it was resumed.
    """

    state: TrainState
    scores: dict[str, float]
    seconds: float = 0.0


def train(experiment: Experiment, *, before_start: Callable[[], None] | None = None) -> TrainResult:
    """Trains, evaluates and saves until `num_steps`; resumes from the last checkpoint of the run.

    Args:
      experiment: the experiment.
      before_start: function that is called after all checks, before anything is written.

    Raises:
      ConfigurationError: lists everything that is wrong with the experiment.
      FloatingPointError: the loss became NaN or infinite.
      InterruptedRunError: the process got SIGTERM; the state is saved.
      Exception: data, a reward or a rollout failed. If the run has one process, its state is saved.
    """
    prepared = prepare.prepare(experiment, run_mode="train")
    assert prepared.train_data is not None
    if before_start is not None:
        before_start()
    plan = describe_plan(experiment, prepared)
    for line in plan.splitlines():
        logging.info("%s", line)
    trainer = Trainer(experiment, prepared.train_data)
    evaluator = None
    if prepared.eval_data is not None:
        evaluator = Evaluator(experiment, prepared.eval_data)
    loop = _Loop(experiment, trainer, evaluator)
    loop.log.write_text(loop.start_step, "plan", plan)
    failed = True
    try:
        with (
            interruption.Interruption() as signals,
            watchdog.Watchdog(experiment.hang_seconds, experiment.model_dir),
        ):
            result = loop.run(signals)
        failed = False
    except interruption.InterruptedRunError:
        failed = False
        raise
    finally:
        loop.close(alone=failed)
    return result


class _Loop:
    """State of the loop: train state, data iterator, metric sums, checkpoints and the log."""

    def __init__(self, experiment: Experiment, trainer: Trainer, evaluator: Evaluator | None):
        self.experiment = experiment
        self.trainer = trainer
        self.evaluator = evaluator
        self.checkpoint_manager = CheckpointManager(
            experiment.model_dir,
            keep=experiment.checkpoints.keep,
            best_mode=experiment.checkpoints.best_mode,
        )
        self.sums = metric_sums.MetricSums()
        self.scores: dict[str, float] = {}
        self.scored_step: int | None = None
        self.seconds_before = 0.0
        self.owes_evaluation = False
        self.saved_step: int | None = None
        self.state, self.start_step, position = self._start()
        layout = experiment.partitioner.data_layout
        self.iterator = trainer.dataset.train_iterator(
            position, process_index=layout.shard_id, process_count=layout.num_shards
        )
        self.log = MetricsLog(
            experiment,
            trainer.phases,
            start_step=self.start_step,
            owes_evaluation=self.owes_evaluation,
        )
        self.steps = NonFiniteSteps(experiment, trainer.dataset.config.vocabulary)
        self.profiler = Profiler(experiment.profile_steps, experiment.model_dir)
        self.start_time = time.monotonic()

    def _start(self) -> tuple[TrainState, int, int]:
        """Resumes this run, or starts from the initial checkpoint or random parameters.

        Returns:
          The train state, its step, and the position of the data iterator.
        """
        # A saved state never has step 0, so that 0 can stand for no checkpoint.
        if process_zero_decides(lambda: self.checkpoint_manager.latest_step() or 0) == 0:
            return self.trainer.init_state(), 0, 0
        state, host, step = self.checkpoint_manager.restore(self.trainer.abstract_state)
        self.trainer.dataset.check_fingerprint(host["data_fingerprint"])
        adapters.check_frozen(self.experiment, self.trainer.frozen_description, host)
        logging.info("resuming after step %d of %d", step, self.experiment.num_steps)
        if self.trainer.replay is not None:
            self.trainer.replay.restore(state.pop("replay"), host["replay"])
            state = TrainState(**state)
        self.scores = host["scores"]
        self.sums = metric_sums.MetricSums.from_host(host["metric_sums"])
        self.seconds_before = host["seconds"]
        self.owes_evaluation = host.get("owes_evaluation", False)
        if self.owes_evaluation and (made := self._made_evaluation(step)) is not None:
            self.scores, self.owes_evaluation = made, False
        if step >= self.experiment.num_steps and not self.owes_evaluation:
            logging.info("nothing to do: set TRAIN_STEPS above %d to train on", step)
        return state, step, host["position"]

    def run(self, signals: interruption.Interruption) -> TrainResult:
        """Runs the remaining steps."""
        num_steps = self.experiment.num_steps
        for step in range(self.start_step, num_steps + 1):
            if signals.is_due():
                # SIGTERM leaves little time: a due evaluation is made after the run is resumed.
                owes = self._is_evaluation_due(step) and step > self.start_step
                self._save(step, owes_evaluation=owes)
                self.checkpoint_manager.wait()
                raise interruption.stopped(step, num_steps)
            # A resumed run does not repeat the evaluation of its first step, which was made before
            # the checkpoint was saved. If SIGTERM prevented the evaluation, it is made now.
            if step > self.start_step or step == 0 or self.owes_evaluation:
                self._evaluate_if_due(step)
                self._save_if_due(step)
                self.owes_evaluation = False
            if step == num_steps:
                break
            self._make_step(step)
            watchdog.beat()
            if (step + 1) % self.experiment.log_period == 0 or step + 1 == num_steps:
                self.steps.finish()
                sums, self.sums = self.sums.to_host(), metric_sums.MetricSums()
                self.log.write_training(step + 1, sums, num_updates=int(self.state.step))
        self.checkpoint_manager.wait()
        return TrainResult(state=self.state, scores=self.scores, seconds=self._seconds())

    def _make_step(self, step: int) -> None:
        start, position = time.monotonic(), self.iterator.position
        try:
            with self.profiler.step(step + 1) as tell:
                batch = self.experiment.partitioner.shard_batch(next(self.iterator))
                self.log.add_fetching(time.monotonic() - start)
                self.state, groups, batch = self.trainer.step(self.state, batch, step)
                tell(self.state)
        except Exception as error:
            self._save_what_is_there(step, position, error)
            raise
        group = next(kind for kind in StepKind if kind in groups)
        bad, _ = groups[group].pop("non_finite")
        if self.experiment.non_finite.action == "skip":
            groups[group]["skipped"] = (bad, jnp.float32(1))
        for name, metrics in groups.items():
            self.sums.add(name, metrics)
        self.steps.add(step, batch, bad)

    def _save_what_is_there(self, step: int, position: int, error: Exception) -> None:
        """Saves the state if a step failed before its update, so that no finished step is lost.

        A run of several processes does not save: saving needs all processes, and processes that
        did not fail would not take part.
        """
        is_there = not any(array.is_deleted() for array in jax.tree.leaves(self.state))
        if not is_there or jax.process_count() > 1 or step in (0, self.start_step):
            return
        logging.error("step %d failed (%s): saving what was there before it", step + 1, error)
        try:
            if self.saved_step != step:
                self._save(step, position=position)
            self.checkpoint_manager.wait()
        except Exception:
            logging.exception("that could not be saved")
        else:
            error.add_note(
                f"The run failed in step {step + 1}, and has saved the {step} steps before. Mend "
                "what failed, and give the same command again to go on."
            )

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.start_time

    def _is_evaluation_due(self, step: int) -> bool:
        evaluation = self.experiment.evaluation
        if evaluation is None:
            return False
        return step % evaluation.period == 0 or step == self.experiment.num_steps

    def _evaluate_if_due(self, step: int) -> None:
        if self.evaluator is None or not self._is_evaluation_due(step):
            return
        # Wait for steps that are still running: their time counts as training, not as evaluation.
        jax.block_until_ready(self.state)
        start = time.monotonic()
        teaching_params = self.trainer.teaching_params(self.state)
        params = self.trainer.student_params(self.state)
        result = self.evaluator(params, teaching_params, step=step)
        self.scores, self.scored_step = result.values(), step
        self.scores["seconds"] = time.monotonic() - start
        self.log.write_evaluation(step, self.scores)
        if self.owes_evaluation:
            self.owes_evaluation = False
            self.log.sync()
            if jax.process_index() == 0:
                # The checkpoint exists already and is not rewritten: the scores get their own file.
                layout.write_evaluated(self.checkpoint_manager.directory, step, self.scores)
        self._check_best_metric()
        self.log.leave_out(time.monotonic() - start)

    def _made_evaluation(self, step: int) -> dict[str, float] | None:
        """Returns the scores of an evaluation that was made after its step's checkpoint was saved.

        Returns None if there was no such evaluation.
        """
        return layout.read_evaluated(self.checkpoint_manager.directory, step)

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
        # Every scored step is saved, since it may turn out to be the best.
        scored = checkpoints.best_metric is not None and step > 0 and self.scored_step == step
        if due or scored or step == self.experiment.num_steps:
            self._save(step)

    def _save(
        self, step: int, *, owes_evaluation: bool = False, position: int | None = None
    ) -> None:
        if step == 0:
            return  # The initial state needs no checkpoint.
        checkpoints = self.experiment.checkpoints
        self.steps.finish()
        sums = self.sums.to_host()
        # Earlier sums were checked when their line of the metrics log was written.
        non_finite.check_means(metric_sums.means(sums), step)
        if not non_finite.is_finite(self.state):
            what = "the parameters or the optimizer's state are"
            raise FloatingPointError(non_finite.not_finite(what, step))
        self.saved_step = step
        metric = None
        if checkpoints.best_metric is not None and self.scored_step == step:
            metric = self.scores.get(checkpoints.best_metric)
        replay = self.trainer.replay
        self.log.sync()
        self.checkpoint_manager.save(
            step,
            self.state if replay is None else replay.attach(self.state),
            {
                "position": self.iterator.position if position is None else position,
                "data_fingerprint": self.trainer.dataset.fingerprint,
                "vocabulary": vocabularies.describe_vocabulary(
                    self.trainer.dataset.config.vocabulary
                ),
                **self.trainer.frozen_description,
                "scores": self.scores,
                "metric_sums": sums,
                "seconds": self._seconds(),
                "owes_evaluation": owes_evaluation,
                **({} if replay is None else {"replay": replay.host_part()}),
            },
            metric=metric,
        )

    def close(self, *, alone: bool) -> None:
        """Closes all resources.

        Args:
          alone: True after a failure, when other processes may not be closing their resources.
        """
        with contextlib.ExitStack() as stack:  # Closes every resource, even if another fails.
            stack.callback(self.profiler.close)
            stack.callback(self.checkpoint_manager.close, alone=alone)
            stack.callback(self.iterator.close)
            stack.callback(self.log.close)
