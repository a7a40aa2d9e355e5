"""Rewards of sampled outputs, and their combination with the divergence: RL with GKD.

A reward is a function of whole outputs. It is either a Python function of texts that runs on the
host (`HostReward`), or a JAX function of token ids that runs on the devices (`JittedReward`).
"""

import collections
import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np

from gkd_jax.common.array_types import Array, Bool, Float, Metrics
from gkd_jax.common.batch import Batch
from gkd_jax.data.metrics.gsm8k import apply_calculator, parse_answer

Baseline: TypeAlias = Literal["leave_one_out", "group_mean", "none"]
"""Baseline subtracted from a reward. 'leave_one_out': the mean over the prompt's other samples,
which leaves the gradient unbiased. 'group_mean': the mean over all N samples of the prompt, which
scales the gradient by (N - 1) / N. 'none': no baseline."""

TextReward: TypeAlias = Callable[
    [Sequence[str], Sequence[tuple[str, ...]], Sequence[str]], Sequence[float]
]
"""Function of `(prompts, references, samples)`, each with one entry per sample, that returns one
reward per sample."""

BatchReward: TypeAlias = Callable[[Batch, Batch], Float[Array, " B"]]
"""Function of `(sampled, data)` that returns one reward per row. Rows of `data` are repeated, so
that both batches have the same prompt in the same row."""


@dataclasses.dataclass(frozen=True, repr=False)
class HostReward:
    """A reward computed by a Python function of texts, called once per step with all local samples.

    With several processes, each calls the function with its own rows. Processes that share one
    replica of the model have the same rows, and the function must return the same rewards in all
    of these processes.

    Attributes:
      function: function of `(prompts, references, samples)`, three lists with one entry per sample,
        that returns a list or array with one reward per sample. Prompts are complete, even if the
        model saw a truncated one. References are tuples of texts, as the task's metrics get them.
        Samples have not been passed through the task's `output_parser`. In gin:
        `@my_module.my_reward`.

    Raises:
      ValueError: `function` is not callable.
    """

    function: TextReward

    def __post_init__(self) -> None:
        _check_callable("HostReward.function", self.function)

    def __repr__(self) -> str:
        return f"HostReward({_name_of(self.function)})"

    def __call__(
        self,
        prompts: Sequence[str],
        references: Sequence[tuple[str, ...]],
        samples: Sequence[str],
    ) -> Float[np.ndarray, " B"]:
        """Calls the function and checks its result.

        Raises:
          ValueError: the function did not return one finite number per sample.
        """
        name = _name_of(self.function)
        try:
            given = self.function(prompts, references, samples)
        except Exception as error:
            error.add_note(f"In the reward {name} (HostReward.function).")
            raise
        try:
            rewards = np.asarray(given, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the reward {name} must give one number for each sample; got {given!r}. Let it "
                "return a list of floats."
            ) from error
        if rewards.shape != (len(samples),):
            raise ValueError(
                f"the reward {name} must give one number for each sample; got an array of shape "
                f"{rewards.shape} for {len(samples)} samples. Let it return a list of floats in "
                "the order of the samples."
            )
        if not np.all(np.isfinite(rewards)):
            index = int(np.argmin(np.isfinite(rewards)))
            raise ValueError(
                f"the reward {name} must give finite numbers; got {rewards[index]} for the sample "
                f"{samples[index]!r} of the prompt {prompts[index]!r}. Let it give a number such "
                "as 0.0 to what it cannot judge."
            )
        return rewards.astype(np.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class JittedReward:
    """A reward computed by a jitted function of arrays, without a transfer to the host.

    Attributes:
      function: function of `(sampled, data)` that returns a float array with one reward per row of
        `sampled`. Each row of `data` has the prompt of the same row of `sampled`, with the target
        of the dataset.

    Raises:
      ValueError: `function` is not callable.
    """

    function: BatchReward

    def __post_init__(self) -> None:
        _check_callable("JittedReward.function", self.function)

    def __repr__(self) -> str:
        return f"JittedReward({_name_of(self.function)})"


@dataclasses.dataclass(frozen=True)
class RewardMix:
    """The objective of RL with GKD: a weighted sum of reward and divergence.

    Steps on the student's own outputs maximize

      E_x[(1 - alpha) E_{y~Q}[r(y)] - alpha E_{y~Q}[D(P || Q)(y|x)]]

    by REINFORCE. If `OutputMix.student_data_fraction` is below 1, there are also steps on the
    data's targets, which are plain distillation steps.

    Reference: "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    arXiv 2306.13649.

    Attributes:
      reward: reward of each sampled output.
      alpha: weight of the divergence, from 0 (REINFORCE alone) to 1 (distillation alone; rewards
        are only reported). The paper studies 0.05 to 0.5.
      baseline: 'leave_one_out', 'group_mean' or 'none'. The first two need `Rollout.num_samples`
        of at least 2.

    Raises:
      ValueError: a setting is out of range.
    """

    reward: HostReward | JittedReward
    alpha: float
    baseline: Baseline = "leave_one_out"

    def __post_init__(self) -> None:
        if not isinstance(self.reward, HostReward | JittedReward):
            raise ValueError(
                f"RewardMix.reward must be a HostReward or a JittedReward; got {self.reward!r}. "
                "Use HostReward(function); in gin, @rewards.HostReward() with brackets."
            )
        if not (isinstance(self.alpha, (int, float)) and 0.0 <= self.alpha <= 1.0):
            raise ValueError(
                "RewardMix.alpha must be a number from 0 (the reward alone) to 1 (the divergence "
                f"alone); got {self.alpha!r}. Set RewardMix.alpha inside that range."
            )
        if self.baseline not in get_args(Baseline):
            raise ValueError(
                f"RewardMix.baseline must be one of {', '.join(get_args(Baseline))}; got "
                f"{self.baseline!r}. Set it to 'leave_one_out'."
            )


@dataclasses.dataclass(frozen=True)
class SequenceReverseKL:
    """The reverse KL of whole outputs, minimized by policy gradient, as in MiniLLM.

    The reward of a token is log p - log q. The gradient at a token has two parts: the gradient of
    `ReverseKL`, exact over the whole vocabulary, and a policy gradient whose advantage is the mean
    or the sum of the rewards of the tokens that follow. Outputs sampled with `TeacherMixed` get
    importance weights. Two parts of the paper are not implemented: language modelling on another
    corpus, and repeated updates on one batch with PPO's clipping.

    Reference: "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543.

    Attributes:
      length_normalized: whether an advantage is the mean of the rewards that follow, instead of
        their sum. The sum favours short outputs.
    """

    length_normalized: bool = True


def subtract_baseline(
    rewards: Float[Array, " B"], *, num_samples: int, baseline: Baseline
) -> Float[Array, " B"]:
    """Subtracts the baseline from rewards.

    Args:
      rewards: rewards, with the samples of a prompt adjacent.
      num_samples: number of samples per prompt, N; at least 2 unless `baseline` is 'none'.
      baseline: kind of baseline.
    """
    if baseline == "none":
        return rewards
    groups = rewards.reshape(-1, num_samples)
    rest = groups - jnp.mean(groups, axis=1, keepdims=True)
    if baseline == "leave_one_out":
        # r_i - (sum of the others) / (N - 1) equals N / (N - 1) * (r_i - mean of the group).
        rest = rest * (num_samples / (num_samples - 1))
    return rest.reshape(-1)


def reward_metrics(
    rewards: Float[Array, " B"], is_real: Bool[Array, " B"], *, num_samples: int
) -> Metrics:
    """Computes the mean reward, and the mean standard deviation among the samples of a prompt.

    If all samples of a prompt have the same reward, the deviation is 0. Advantages with a baseline
    are then 0 and give no gradient.

    Args:
      rewards: rewards, with the samples of a prompt adjacent.
      is_real: False for filler rows, which do not count.
      num_samples: number of samples per prompt.

    Returns:
      'mean', as (sum, weight) over samples; and if `num_samples` is above 1, 'group_std', as
      (sum, weight) over prompts.
    """
    weights = is_real.astype(jnp.float32)
    metrics: Metrics = {"mean": (jnp.sum(rewards * weights), jnp.sum(weights))}
    if num_samples > 1:
        # The rows of a prompt are either all real or all filler.
        prompt_weights = weights.reshape(-1, num_samples)[:, 0]
        std = jnp.std(rewards.reshape(-1, num_samples), axis=1)
        metrics["group_std"] = (jnp.sum(std * prompt_weights), jnp.sum(prompt_weights))
    return metrics


def final_answer(
    prompts: Sequence[str],
    references: Sequence[tuple[str, ...]],
    samples: Sequence[str],
    *,
    use_calculator: bool = False,
) -> list[float]:
    """Rewards a worked solution with 1 if its final answer is numerically correct, else with 0.

    A `TextReward` for arithmetic word problems and GSM8K. The metric `gsm8k_accuracy` uses the same
    test.

    Args:
      prompts: not used.
      references: worked solutions, or plain answers.
      samples: sampled solutions.
      use_calculator: whether to correct the equations in the samples first, like the option of
        `gsm8k_accuracy` of the same name.

    Raises:
      ValueError: a reference has no number.
    """
    rewards = []
    for prompt, texts, sample in zip(prompts, references, samples, strict=True):
        gold = {parse_answer(text) for text in texts}
        if None in gold:
            raise ValueError(
                f"a reference must hold a final answer; got {texts!r} for the prompt {prompt!r}. "
                "Check the task's target field, or use another reward than final_answer."
            )
        answer = parse_answer(apply_calculator(sample) if use_calculator else sample)
        rewards.append(float(answer in gold))
    return rewards


def unigram_f1(
    prompts: Sequence[str], references: Sequence[tuple[str, ...]], samples: Sequence[str]
) -> list[float]:
    """Rewards a sample with the unigram F1 score between it and the best of its references.

    For a sample of s words and a reference of r words with m words in common (a multiset
    intersection),

      F1 = 2 m / (s + r).

    Words are separated by whitespace, lowercased, and stripped of surrounding punctuation. This
    `TextReward` is close to ROUGE-1 without stemming ("ROUGE: A Package for Automatic Evaluation of
    Summaries", https://aclanthology.org/W04-1013). It suits translations and summaries and ignores
    the order of words.

    Args:
      prompts: not used.
      references: reference texts of each sample.
      samples: sampled texts.
    """
    del prompts
    return [
        max((_overlap(_words(sample), _words(text)) for text in texts), default=0.0)
        for texts, sample in zip(references, samples, strict=True)
    ]


def _words(text: str) -> collections.Counter[str]:
    stripped = (word.strip(string.punctuation) for word in text.lower().split())
    return collections.Counter(word for word in stripped if word)


def _overlap(one: collections.Counter[str], other: collections.Counter[str]) -> float:
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 0.0


def _name_of(function: Callable[..., object]) -> str:
    # The repr of a function contains its address, which differs between runs.
    return getattr(function, "__qualname__", repr(function))


def _check_callable(setting: str, function: object) -> None:
    if not callable(function):
        raise ValueError(
            f"{setting} must be a function; got {function!r}. Give it one; in gin, "
            "@my_module.my_reward without brackets."
        )
