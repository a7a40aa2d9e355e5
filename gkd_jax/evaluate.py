"""Run mode `eval`, and the evaluation inside training: task metrics and divergences."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from gkd_jax import prepare, rollout, runtime, train_step
from gkd_jax.array_types import Params
from gkd_jax.batch import Batch
from gkd_jax.checkpoints import load
from gkd_jax.data.pipeline import Dataset
from gkd_jax.experiment import Experiment
from gkd_jax.metrics.score import Score
from gkd_jax.runtime import Purpose, make_key


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Scores of one evaluation and the outputs that they come from.

    Attributes:
      scores: by metric name, with standard errors where they exist.
      predictions: decoded text by position in the data set; empty on all processes but the first.
    """

    scores: dict[str, Score]
    predictions: list[str]

    def values(self) -> dict[str, float]:
        """Plain numbers: each score, and its standard error as 'name_se'."""
        values = {name: float(score.value) for name, score in self.scores.items()}
        for name, score in self.scores.items():
            if score.standard_error is not None:
                values[f"{name}_se"] = float(score.standard_error)
        return values


class Evaluator:
    """Evaluates parameters of the student on held-out examples, with functions jitted once."""

    def __init__(self, experiment: Experiment, dataset: Dataset):
        if experiment.evaluation is None:
            raise ValueError("Evaluator needs Experiment.evaluation; got None. Set it.")
        self.experiment = experiment
        self.dataset = dataset
        self.config = experiment.evaluation
        model, partitioner = experiment.student.model, experiment.partitioner
        vocabulary = dataset.config.vocabulary
        decoding = rollout.Rollout(method=self.config.method)
        self._decode = runtime.jit_rollout(decoding, model, vocabulary, partitioner)
        self._divergence = None
        if experiment.objective.divergence.needs_teacher and self.config.num_divergence_examples:
            assert experiment.teacher is not None
            self._divergence = jax.jit(
                partitioner.annotate(
                    train_step.make_eval_step(model, experiment.teacher.model, experiment.objective)
                )
            )
        self._rollout = runtime.jit_rollout(experiment.rollout, model, vocabulary, partitioner)
        self._output_metrics = jax.jit(
            functools.partial(rollout.rollout_metrics, eos_ids=vocabulary.eos_ids)
        )

    def __call__(
        self, params: Params, teacher_params: Params | None, *, step: int = 0
    ) -> EvalResult:
        """Decodes and scores every example once, over all processes.

        Args:
          params: the student's parameters.
          teacher_params: the teacher's, for the divergences; None leaves them out.
          step: names the file of predictions; also part of the random keys.
        """
        sums = runtime.MetricSums()
        texts: dict[int, str] = {}
        key = make_key(self.experiment.seed, Purpose.EVALUATION, step)
        seen = 0
        for batch in self._batches():
            decoded = self._decode(params, batch, key)
            sums.add("outputs", self._output_metrics(decoded))
            texts.update(self._texts(decoded))
            if (
                self._divergence is not None
                and teacher_params is not None
                and seen < self.config.num_divergence_examples
            ):
                sums.add("on_data", self._divergence(params, teacher_params, batch))
                sampled = self._rollout(params, batch, key)
                sums.add("on_samples", self._divergence(params, teacher_params, sampled))
                sums.add("samples", self._output_metrics(sampled))
            seen += batch.targets.shape[0]
        means = sums.means()
        scores = {name: Score(value) for name, value in means.items() if "target_tokens" not in name}
        predictions = [texts[index] for index in sorted(texts)]
        if jax.process_index() == 0:
            scores = self._task_scores(predictions) | scores
            self._write_predictions(predictions, scores, step)
        return EvalResult(scores=scores, predictions=predictions)

    def _batches(self) -> Iterator[Batch]:
        partitioner = self.experiment.partitioner
        layout = partitioner.data_layout
        for batch, _ in self.dataset.eval_batches(
            process_index=layout.shard_id, process_count=layout.num_shards
        ):
            yield partitioner.shard_batch(batch)

    def _texts(self, decoded: Batch) -> dict[int, str]:
        """Decodes token ids to text, keyed by the example's position in the data set."""
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

    def _task_scores(self, predictions: list[str]) -> dict[str, Score]:
        task = self.dataset.task
        references = [list(self.dataset.raw(i).references) for i in range(len(predictions))]
        parsed = [task.output_parser(prediction) for prediction in predictions]
        scores: dict[str, Score] = {}
        for metric in task.metrics:
            scores.update(metric(references, parsed))
        return scores

    def _write_predictions(
        self, predictions: list[str], scores: dict[str, Score], step: int
    ) -> None:
        folder = epath.Path(self.experiment.model_dir) / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, prediction in enumerate(predictions):
            example = self.dataset.raw(index)
            row: dict[str, Any] = {
                "inputs": example.inputs,
                "prediction": prediction,
                "references": list(example.references),
            }
            lines.append(json.dumps(row, ensure_ascii=False))
        (folder / f"predictions_{step}.jsonl").write_text("\n".join(lines) + "\n")
        details = {name: dataclasses.asdict(score) for name, score in scores.items()}
        (folder / f"scores_{step}.json").write_text(json.dumps(details, indent=1) + "\n")


def evaluate(experiment: Experiment) -> EvalResult:
    """Evaluates the newest checkpoint in `model_dir`, or the student's initial checkpoint.

    Raises:
      gkd_jax.prepare.ConfigurationError: something is wrong with the experiment; lists all.
    """
    prepared = prepare.prepare(experiment, run_mode="eval")
    assert prepared.eval_data is not None
    params, step = runtime.student_to_use(experiment)
    evaluator = Evaluator(experiment, prepared.eval_data)
    result = evaluator(params, runtime.load_teacher(experiment), step=step)
    for name, score in result.scores.items():
        logging.info("eval/%s: %s", name, score)
    return result
