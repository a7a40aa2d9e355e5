"""Rewards of sampled outputs, and how they join the divergence: RL with GKD.

A reward is a function of whole outputs. It is written in Python, of texts, and runs on the host
(`HostReward`), or in JAX, of token ids, and runs where the outputs lie (`JittedReward`).
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
"""What is subtracted from a reward. 'leave_one_out': the mean of the prompt's other samples, which
leaves the gradient unbiased; 'group_mean': the mean of all its N samples, which makes it (N-1)/N
times as large; 'none'."""

TextReward: TypeAlias = Callable[
    [Sequence[str], Sequence[tuple[str, ...]], Sequence[str]], Sequence[float]
]
"""(prompts, references, samples), an entry of each for every sample -> a reward for each."""

BatchReward: TypeAlias = Callable[[Batch, Batch], Float[Array, " B"]]
"""(samples, the data's batch with its rows repeated for each sample) -> a reward for each row."""


@dataclasses.dataclass(frozen=True, repr=False)
class HostReward:
    """A reward by a Python function of texts, called once a step with all samples at hand.

    Several processes call it with rows of their own; where a model spans processes, they call it
    with the same rows and it must give all of them the same.

    Attributes:
      function: `(prompts, references, samples)` to numbers: three lists with an entry for each
        sample, and a list (or array) of as many rewards. Prompts are whole, whatever the model
        was shown of them; references are tuples of texts as the task's metrics get them; samples
        have not gone through the task's `output_parser`. In gin: `@my_module.my_reward`.

    Raises:
      ValueError: it cannot be called.
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
        """Calls the function and checks what it gives.

        Raises:
          ValueError: not one finite number a sample; names the function.
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
    """A reward by a function of arrays, jitted: it takes no trip to the host.

    Attributes:
      function: `(sampled, data)` to a float array with one reward for each row of `sampled`. The
        rows of `data`, prompts with the data's own outputs, are those of `sampled`.

    Raises:
      ValueError: it cannot be called.
    """

    function: BatchReward

    def __post_init__(self) -> None:
        _check_callable("JittedReward.function", self.function)

    def __repr__(self) -> str:
        return f"JittedReward({_name_of(self.function)})"


@dataclasses.dataclass(frozen=True)
class RewardMix:
    """The objective of RL with GKD (arXiv 2306.13649): reward and divergence together.

    Maximises E_x[(1 - alpha) E_{y~Q}[r(y)] - alpha E_{y~Q}[D(P || Q)(y|x)]] by REINFORCE, on the
    steps that train on the student's own outputs. Steps on the data's outputs, if
    `OutputMix.student_data_fraction` leaves any, are those of distillation.

    Attributes:
      reward: of each sampled output.
      alpha: weight of the divergence, from 0 (REINFORCE alone) to 1 (distillation alone; rewards
        are measured and change nothing). The paper studies 0.05 to 0.5.
      baseline: 'leave_one_out', 'group_mean' or 'none'; those of a group need
        `Rollout.num_samples` of 2 or more.

    Raises:
      ValueError: a setting is outside its range.
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
    """MiniLLM (arXiv 2306.08543): the reverse KL of whole outputs, by policy gradient.

    A token's reward is log p - log q. Its own, which the divergence `ReverseKL` differentiates over
    the whole vocabulary, and what follows it, which reaches it as its advantage, make up the
    gradient. Outputs that a `TeacherMixed` policy helped to write are weighed by importance. The
    paper's language modelling on another corpus, and its repeated updates on one batch with PPO's
    clipping, are left out.

    Attributes:
      length_normalized: an advantage is the mean of what follows and not the sum, which favours
        short outputs.
    """

    length_normalized: bool = True


def subtract_baseline(
    rewards: Float[Array, " B"], *, num_samples: int, baseline: Baseline
) -> Float[Array, " B"]:
    """Rewards less their baseline.

    Args:
      rewards: the samples of a prompt are next to each other.
      num_samples: N samples a prompt; 2 or more for a baseline of the group.
      baseline: which.
    """
    if baseline == "none":
        return rewards
    groups = rewards.reshape(-1, num_samples)
    rest = groups - jnp.mean(groups, axis=1, keepdims=True)
    if baseline == "leave_one_out":
        # r_i - (sum of the others) / (N - 1) is N / (N - 1) times what the group's mean leaves.
        rest = rest * (num_samples / (num_samples - 1))
    return rest.reshape(-1)


def reward_metrics(
    rewards: Float[Array, " B"], is_real: Bool[Array, " B"], *, num_samples: int
) -> Metrics:
    """The mean reward, and its standard deviation among the samples of a prompt.

    Where that is 0 a baseline of the group leaves nothing to learn.

    Args:
      rewards: the samples of a prompt are next to each other.
      is_real: False on rows that count nowhere.
      num_samples: N samples a prompt.

    Returns:
      'mean' and, for several samples, 'group_std', as (sum, weight) over samples and prompts.
    """
    counts = is_real.astype(jnp.float32)
    metrics: Metrics = {"mean": (jnp.sum(rewards * counts), jnp.sum(counts))}
    if num_samples > 1:
        # The rows of a prompt are all real or none.
        of_prompt = counts.reshape(-1, num_samples)[:, 0]
        std = jnp.std(rewards.reshape(-1, num_samples), axis=1)
        metrics["group_std"] = (jnp.sum(std * of_prompt), jnp.sum(of_prompt))
    return metrics


def final_answer(
    prompts: Sequence[str],
    references: Sequence[tuple[str, ...]],
    samples: Sequence[str],
    *,
    use_calculator: bool = False,
) -> list[float]:
    """1 for a worked solution whose final answer is right as a number, else 0; a `TextReward`.

    For arithmetic word problems and GSM8K: what `gsm8k_accuracy` counts.

    Args:
      prompts: not read.
      references: worked solutions, or plain answers.
      samples: sampled solutions.
      use_calculator: corrects the samples' equations first, as `gsm8k_accuracy` may.

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
    """How many words a sample shares with a reference: F1 of the two bags; a `TextReward`.

    F1 = 2 m / (s + r) of m words in common, counted as often as both have them, s of the sample and
    r of the reference; of several references the best. Words are what stands between spaces, in
    lower case, without punctuation around them: much like ROUGE-1 without stemming (Lin 2004,
    https://aclanthology.org/W04-1013). For translations and summaries; blind to the order of words.

    Args:
      prompts: not read.
      references: texts that are right.
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
    # repr of a function has its address, which no two runs share.
    return getattr(function, "__qualname__", repr(function))


def _check_callable(setting: str, function: object) -> None:
    if not callable(function):
        raise ValueError(
            f"{setting} must be a function; got {function!r}. Give it one; in gin, "
            "@my_module.my_reward without brackets."
        )
