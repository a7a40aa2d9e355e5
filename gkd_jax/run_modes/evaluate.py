"""Run mode `eval`, and the evaluation during training: task metrics and divergences."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from gkd_jax.common.array_types import Params
from gkd_jax.common.batch import Batch
from gkd_jax.data.metrics.score import Score
from gkd_jax.data.pipeline import Dataset
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.experiment import prepare
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.step_objectives import measured_objective
from gkd_jax.training import jitted_functions, metric_sums, parameters, watchdog
from gkd_jax.training.keys import Purpose, make_key
from gkd_jax.training.teacher_tokens import make_retokenizer


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Scores of an evaluation and the outputs that they were computed from.

    Attributes:
      scores: scores by metric name, some with a standard error.
      predictions: decoded texts in the order of the data set; empty on all processes but the first.
    """

    scores: dict[str, Score]
    predictions: list[str]

    def values(self) -> dict[str, float]:
        """Returns each score as a number, and its standard error as 'name_se'."""
        values = {name: float(score.value) for name, score in self.scores.items()}
        for name, score in self.scores.items():
            if score.standard_error is not None:
                values[f"{name}_se"] = float(score.standard_error)
        return values


class Evaluator:
    """Evaluates student parameters on held-out examples, with functions that are jitted once."""

    def __init__(self, experiment: Experiment, dataset: Dataset, *, folder: str = "eval"):
        """Makes the jitted functions.

        Args:
          experiment: the experiment, which must have an `evaluation`.
          dataset: the opened data set of that evaluation.
          folder: name of the folder in `model_dir` for predictions and scores.
        """
        if experiment.evaluation is None:
            raise ValueError("Evaluator needs Experiment.evaluation; got None. Set it.")
        self.experiment = experiment
        self.dataset = dataset
        self.config = experiment.evaluation
        self._folder = epath.Path(experiment.model_dir) / folder
        model, partitioner = experiment.student.model, experiment.partitioner
        vocabulary = dataset.config.vocabulary
        ids = {"eos_ids": vocabulary.eos_ids, "pad_id": vocabulary.pad_id}
        decoding = Rollout(method=self.config.method)
        self._decode = jitted_functions.jit_rollout(decoding, model, partitioner, **ids)
        # The teacher scores these samples, so the student samples only tokens that the teacher has.
        student = experiment.student_model
        self._rollout = jitted_functions.jit_rollout(
            experiment.rollout, student, partitioner, **ids
        )
        self._output_metrics = jitted_functions.jit_rollout_metrics(vocabulary.eos_ids)
        self._needs_teacher = experiment.objective.divergence.needs_teacher
        teacher = experiment.teacher_model if self._needs_teacher else None
        self._objective = None
        stored = dataset.stored_teacher
        if teacher is not None or stored is not None or not self._needs_teacher:
            objective = measured_objective(experiment, vocabulary)
            self._objective = jitted_functions.jit_eval_step(
                student, teacher, objective, partitioner
            )
        self._retokenizer = make_retokenizer(experiment, vocabulary)

    def __call__(
        self, params: Params, teaching_params: Params | None, *, step: int = 0
    ) -> EvalResult:
        """Decodes and scores every example once, over all processes.

        Args:
          params: student's parameters.
          teaching_params: teacher's parameters. If None, the student can be compared only with a
            stored teacher.
          step: training step. It enters the random keys and the names of the written files.
        """
        sums = metric_sums.MetricSums()
        texts: dict[int, str] = {}
        key = make_key(self.experiment.seed, Purpose.EVALUATION, step)
        for number, batch in enumerate(self._batches()):
            decoded = self._decode(params, batch, key)
            sums.add("outputs", self._output_metrics(decoded))
            texts.update(self._texts(decoded))
            watchdog.beat()
            if number * self.dataset.config.batch_size < self.config.num_divergence_examples:
                self._add_objective(sums, params, teaching_params, batch, step)
        means = sums.means()
        scores = {
            name: Score(value) for name, value in means.items() if "target_tokens" not in name
        }
        predictions = [texts[index] for index in sorted(texts)]
        if jax.process_index() == 0:
            scores = task_scores(self.dataset, predictions) | scores
            self._write_predictions(predictions, scores, step)
        return EvalResult(scores=scores, predictions=predictions)

    def _add_objective(
        self,
        sums: metric_sums.MetricSums,
        params: Params,
        teaching_params: Params | None,
        batch: Batch,
        step: int,
    ) -> None:
        """Adds the objective on the data's outputs and, if possible, on the student's samples.

        Only a teacher with parameters can score samples. A stored teacher has distributions for the
        data's outputs alone.
        """
        can_score = teaching_params is not None or batch.stored_teacher is not None
        if self._objective is None or (self._needs_teacher and not can_score):
            return
        sums.add("on_data", self._objective(params, teaching_params, self._retokenized(batch)))
        if self._needs_teacher and teaching_params is not None:
            key = make_key(self.experiment.seed, Purpose.EVALUATION_SAMPLES, step)
            sampled = self._rollout(params, batch, key)
            sums.add("samples", self._output_metrics(sampled))
            sampled = jitted_functions.without_log_probs(sampled)
            sums.add(
                "on_samples", self._objective(params, teaching_params, self._retokenized(sampled))
            )

    def _retokenized(self, batch: Batch) -> Batch:
        """Adds the teacher's tokens to a batch if the teacher has its own tokenizer."""
        return batch if self._retokenizer is None else self._retokenizer(batch)[0]

    def _batches(self) -> Iterator[Batch]:
        partitioner = self.experiment.partitioner
        layout = partitioner.data_layout
        for batch, _ in self.dataset.eval_batches(
            process_index=layout.shard_id, process_count=layout.num_shards
        ):
            yield partitioner.shard_batch(batch)

    def _texts(self, decoded: Batch) -> dict[int, str]:
        """Returns the decoded texts of a batch, by the example's position in the data set."""
        host = self.experiment.partitioner.fetch_to_host(
            (decoded.example_id, decoded.targets, decoded.loss_weights)
        )
        if jax.process_index() != 0:
            return {}
        ids, tokens, weights = (np.asarray(array) for array in host)
        vocabulary = self.dataset.config.vocabulary
        return {
            int(index): vocabulary.decode(row[kept > 0].tolist())
            for index, row, kept in zip(ids, tokens, weights, strict=True)
            if index >= 0
        }

    def _write_predictions(
        self, predictions: list[str], scores: dict[str, Score], step: int
    ) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, prediction in enumerate(predictions):
            example = self.dataset.raw(index)
            row: dict[str, Any] = {
                "inputs": example.inputs,
                "prediction": prediction,
                "references": list(example.references),
            }
            lines.append(json.dumps(row, ensure_ascii=False))
        (self._folder / f"predictions_{step}.jsonl").write_text("\n".join(lines) + "\n")
        details = {name: dataclasses.asdict(score) for name, score in scores.items()}
        (self._folder / f"scores_{step}.json").write_text(json.dumps(details, indent=1) + "\n")


def task_scores(dataset: Dataset, predictions: Sequence[str]) -> dict[str, Score]:
    """Computes the task's metrics of predictions for the first examples of a data set."""
    task = dataset.task
    references = [list(dataset.raw(index).references) for index in range(len(predictions))]
    parsed = [task.output_parser(prediction) for prediction in predictions]
    scores: dict[str, Score] = {}
    for metric in task.metrics:
        scores.update(metric(references, parsed))
    return scores


def score_names(dataset: Dataset) -> list[str]:
    """Lists the names of the task's scores, which are found by scoring a few outputs."""
    examples = range(min(2, dataset.num_examples))
    return sorted(task_scores(dataset, [dataset.raw(index).targets for index in examples]))


def evaluate(experiment: Experiment) -> EvalResult:
    """Evaluates the newest checkpoint in `model_dir`, or the student's initial checkpoint.

    Raises:
      ConfigurationError: lists everything that is wrong with the experiment.
    """
    prepared = prepare.prepare(experiment, run_mode="eval")
    assert prepared.eval_data is not None
    frozen = parameters.load_frozen(experiment)
    student = parameters.student_to_use(experiment, frozen=frozen)
    needs_teacher = experiment.objective.divergence.needs_teacher
    teaching_params = None
    if needs_teacher and experiment.teacher is not None:
        teaching_params = parameters.teacher_to_use(experiment, frozen=frozen).params
    evaluator = Evaluator(experiment, prepared.eval_data)
    result = evaluator(student.params, teaching_params, step=student.step)
    for name, score in result.scores.items():
        logging.info("eval/%s: %s", name, score)
    return result
