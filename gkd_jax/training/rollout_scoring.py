"""Computes advantages of sampled outputs, from a reward or from both models' log-probabilities."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.common.array_types import Array, Float, Metrics, Params
from gkd_jax.common.batch import Batch
from gkd_jax.data.pipeline import Dataset
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.loss import make_returns_fn
from gkd_jax.distillation.rewards import (
    Baseline,
    HostReward,
    JittedReward,
    RewardMix,
    SequenceReverseKL,
    reward_metrics,
    subtract_baseline,
)
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.objective import Reduction
from gkd_jax.objectives.policy_gradient import token_advantages
from gkd_jax.sampling.outputs import repeat_rows
from gkd_jax.sampling.teacher_assisted import TeacherMixed

Scorer: TypeAlias = Callable[[Params, Params | None, Batch, Batch], tuple[Batch, Metrics]]
"""Function of `(student_params, teaching_params, data, sampled)`, where `sampled` holds outputs for
the prompts of the batch `data`. Returns `sampled` with the scores for the step, and metrics."""


def make_scorer(experiment: Experiment, dataset: Dataset) -> Scorer | None:
    """Returns the scorer of the student's own outputs in training; None without a reward.

    Args:
      experiment: the run, whose settings have already been checked.
      dataset: the training data of the run.
    """
    reward, rollout = experiment.reward, experiment.rollout
    if reward is None:
        return None
    if isinstance(reward, RewardMix):
        return RewardScorer(
            reward,
            dataset,
            experiment.partitioner,
            num_samples=rollout.num_samples,
            reduction=experiment.objective.reduction,
        )
    assert experiment.teacher_model is not None
    assistance = rollout.teacher_assistance
    return ReturnScorer(
        reward,
        experiment.student_model,
        experiment.teacher_model,
        experiment.partitioner,
        teacher_share=assistance.teacher_share if isinstance(assistance, TeacherMixed) else 0.0,
    )


class RewardScorer:
    """Computes advantages from a reward and adds them to sampled outputs."""

    def __init__(
        self,
        mix: RewardMix,
        dataset: Dataset,
        partitioner: Partitioner,
        *,
        num_samples: int,
        reduction: Reduction,
    ):
        """Builds the jitted functions.

        Args:
          mix: reward, baseline and alpha.
          dataset: source of the prompts. A `HostReward` gets the texts of the prompts and of their
            references.
          partitioner: shards rewards and advantages over devices like a batch.
          num_samples: number of samples per prompt.
          reduction: reduction of the objective.
        """
        self._reward = mix.reward
        self._dataset = dataset
        self._partitioner = partitioner
        self._num_samples = num_samples
        if isinstance(mix.reward, JittedReward):
            self._score_rows = _jit_reward(mix.reward, partitioner, num_samples)
        # With an alpha of 1 the step is plain distillation, whose batches have no advantages.
        self._advantages = None
        if mix.alpha < 1.0:
            self._advantages = _jit_advantages(partitioner, num_samples, mix.baseline, reduction)
        self._metrics = _jit_metrics(num_samples)

    def __call__(
        self, params: Params, teaching_params: Params | None, data: Batch, sampled: Batch
    ) -> tuple[Batch, Metrics]:
        """Scores the outputs of a step.

        Args:
          params: not used.
          teaching_params: not used.
          data: batch of the training data, with the targets of the dataset.
          sampled: outputs sampled for the prompts of `data`. Samples of one prompt are in adjacent
            rows.

        Returns:
          `sampled` with `advantages`, or unchanged if alpha is 1; and the metrics of the reward.

        Raises:
          ValueError: a `HostReward` did not return one finite number per sample.
        """
        del params, teaching_params
        if isinstance(self._reward, HostReward):
            local: Any = self._score_texts(self._reward, data, sampled)
            rewards = self._partitioner.shard_batch(local)
        else:
            rewards = self._score_rows(data, sampled)
        if self._advantages is not None:
            advantages = self._advantages(rewards, sampled.loss_weights)
            sampled = dataclasses.replace(sampled, advantages=advantages)
        return sampled, self._metrics(rewards, sampled.example_id)

    def _score_texts(
        self, reward: HostReward, data: Batch, sampled: Batch
    ) -> Float[np.ndarray, " B"]:
        """Returns the rewards of this process's rows."""
        positions, tokens, weights = self._partitioner.local_rows(
            (data.example_id, sampled.targets, sampled.loss_weights)
        )
        dataset, vocabulary = self._dataset, self._dataset.config.vocabulary
        examples = [dataset.raw(dataset.source_index(int(position))) for position in positions]
        repeated = [example for example in examples for _ in range(self._num_samples)]
        return reward(
            [example.inputs for example in repeated],
            [example.references for example in repeated],
            [
                vocabulary.decode(row[row_weights > 0].tolist())
                for row, row_weights in zip(tokens, weights, strict=True)
            ],
        )


class ReturnScorer:
    """Adds MiniLLM's advantages, and importance weights if needed, to sampled outputs."""

    def __init__(
        self,
        settings: SequenceReverseKL,
        student: LanguageModel,
        teacher: LanguageModel,
        partitioner: Partitioner,
        *,
        teacher_share: float,
    ):
        """Builds the jitted function.

        Args:
          settings: definition of the returns.
          student: model being trained.
          teacher: model whose log-probabilities define the reward.
          partitioner: shards the results over devices like a batch.
          teacher_share: weight of the teacher in the mixture that outputs are sampled from; 0 if
            they are sampled from the student alone.
        """
        returns = make_returns_fn(
            student, teacher, length_normalized=settings.length_normalized,
            teacher_share=teacher_share,
        )  # fmt: skip
        shardings = (partitioner.batch_sharding, partitioner.batch_sharding, partitioner.replicated)
        self._returns = jax.jit(partitioner.annotate(returns), out_shardings=shardings)

    def __call__(
        self, params: Params, teaching_params: Params | None, data: Batch, sampled: Batch
    ) -> tuple[Batch, Metrics]:
        """Scores the outputs of a step with the current parameters of both models."""
        del data
        advantages, importance, metrics = self._returns(params, teaching_params, sampled)
        sampled = dataclasses.replace(sampled, advantages=advantages, importance=importance)
        return sampled, metrics


def _jit_reward(
    reward: JittedReward, partitioner: Partitioner, num_samples: int
) -> Callable[[Batch, Batch], Array]:
    def score(data: Batch, sampled: Batch) -> Array:
        rewards = jnp.asarray(reward.function(sampled, repeat_rows(data, num_samples)))
        if rewards.shape != sampled.example_id.shape:
            raise ValueError(
                f"{reward} must give one number for each sample; "
                f"got shape {rewards.shape} for {len(sampled.example_id)} samples. Let it return "
                "a float array with an entry for each row."
            )
        return rewards.astype(jnp.float32)

    return jax.jit(score, out_shardings=partitioner.batch_sharding)


@functools.cache
def _jit_advantages(
    partitioner: Partitioner, num_samples: int, baseline: Baseline, reduction: Reduction
) -> Callable[[Array, Array], Array]:
    def advantages(rewards: Array, loss_weights: Array) -> Array:
        rest = subtract_baseline(rewards, num_samples=num_samples, baseline=baseline)
        return token_advantages(rest, loss_weights, reduction=reduction)

    return jax.jit(advantages, out_shardings=partitioner.batch_sharding)


@functools.cache
def _jit_metrics(num_samples: int) -> Callable[[Array, Array], Metrics]:
    def metrics(rewards: Array, example_id: Array) -> Metrics:
        return reward_metrics(rewards, example_id >= 0, num_samples=num_samples)

    return jax.jit(metrics)
