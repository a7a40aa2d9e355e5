"""Scores sampled outputs, by a reward or by both models: advantages for the loss."""

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
"""(student's parameters, teacher's, the data's batch, the outputs sampled for its prompts) -> those
outputs with what a step needs besides, and metrics."""


def make_scorer(experiment: Experiment, dataset: Dataset) -> Scorer | None:
    """What scores the student's own outputs in training; None for distillation alone.

    Args:
      experiment: checked.
      dataset: its training data, opened.
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
    """Gives sampled outputs the advantages that their rewards mean."""

    def __init__(
        self,
        mix: RewardMix,
        dataset: Dataset,
        partitioner: Partitioner,
        *,
        num_samples: int,
        reduction: Reduction,
    ):
        """Makes the functions.

        Args:
          mix: the reward, its baseline and alpha.
          dataset: where the prompts come from; a host's reward is given their texts.
          partitioner: rows lie on the devices as those of a batch do.
          num_samples: samples a prompt.
          reduction: that of the objective.
        """
        self._reward = mix.reward
        self._dataset = dataset
        self._partitioner = partitioner
        self._num_samples = num_samples
        if isinstance(mix.reward, JittedReward):
            self._score_rows = _jit_reward(mix.reward, partitioner, num_samples)
        # At an alpha of 1 the step is that of distillation, whose batches have no advantages.
        self._advantages = None
        if mix.alpha < 1.0:
            self._advantages = _jit_advantages(partitioner, num_samples, mix.baseline, reduction)
        self._metrics = _jit_metrics(num_samples)

    def __call__(
        self, params: Params, teaching_params: Params | None, data: Batch, sampled: Batch
    ) -> tuple[Batch, Metrics]:
        """Scores the outputs of a step.

        Args:
          params: not read.
          teaching_params: not read.
          data: the training data's batch, with its own outputs.
          sampled: outputs that were sampled for its prompts, the samples of one side by side.

        Returns:
          `sampled` with `advantages`, or as it is where alpha is 1; and the reward's metrics.

        Raises:
          ValueError: a host's reward gave something else than one finite number a sample.
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
        """The rewards of this process's rows."""
        positions, tokens, weights = self._partitioner.local_rows(
            (data.example_id, sampled.targets, sampled.loss_weights)
        )
        dataset, vocabulary = self._dataset, self._dataset.config.vocabulary
        examples = [dataset.raw(dataset.source_index(int(position))) for position in positions]
        of_samples = [example for example in examples for _ in range(self._num_samples)]
        return reward(
            [example.inputs for example in of_samples],
            [example.references for example in of_samples],
            [
                vocabulary.decode(row[kept > 0].tolist())
                for row, kept in zip(tokens, weights, strict=True)
            ],
        )


class ReturnScorer:
    """Gives sampled outputs the advantages, and the importance, of MiniLLM."""

    def __init__(
        self,
        settings: SequenceReverseKL,
        student: LanguageModel,
        teacher: LanguageModel,
        partitioner: Partitioner,
        *,
        teacher_share: float,
    ):
        """Makes the function.

        Args:
          settings: the return.
          student: who learns.
          teacher: who judges, and helps to write if the share is above 0.
          partitioner: rows lie on the devices as those of a batch do.
          teacher_share: of the mixture that wrote the outputs.
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
        """Scores the outputs of a step by both models at their present parameters."""
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
