"""Scores sampled outputs: texts on the host, or arrays where they lie; advantages for the loss."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.array_types import Array, Float, Metrics
from gkd_jax.batch import Batch
from gkd_jax.data.pipeline import Dataset
from gkd_jax.objectives.objective import Reduction
from gkd_jax.objectives.policy_gradient import token_advantages
from gkd_jax.partitioning import Partitioner
from gkd_jax.rewards import (
    Baseline,
    HostReward,
    JittedReward,
    RewardMix,
    reward_metrics,
    subtract_baseline,
)
from gkd_jax.sampling.outputs import repeat_rows


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

    def __call__(self, data: Batch, sampled: Batch) -> tuple[Batch, Metrics]:
        """Scores the outputs of a step.

        Args:
          data: the training data's batch, with its own outputs.
          sampled: outputs that were sampled for its prompts, the samples of one side by side.

        Returns:
          `sampled` with `advantages`, or as it is where alpha is 1; and the reward's metrics.

        Raises:
          ValueError: a host's reward gave something else than one finite number a sample.
        """
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


def _jit_reward(
    reward: JittedReward, partitioner: Partitioner, num_samples: int
) -> Callable[[Batch, Batch], Array]:
    def score(data: Batch, sampled: Batch) -> Array:
        rewards = jnp.asarray(reward.function(sampled, repeat_rows(data, num_samples)))
        if rewards.shape != sampled.example_id.shape:
            raise ValueError(
                f"JittedReward.function {reward.function!r} must give one number for each sample; "
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
