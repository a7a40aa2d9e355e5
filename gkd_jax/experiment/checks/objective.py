"""Checks that the objective fits the training outputs, and that the best metric is measured."""

from gkd_jax.distillation.rewards import RewardMix
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.objectives.divergence_sums import WeightedSum
from gkd_jax.objectives.divergences import NegativeLogLikelihood
from gkd_jax.objectives.other_divergences import SampledReverseKL
from gkd_jax.sampling.methods import Sample


def check_objective(experiment: Experiment) -> None:
    """Checks that the divergence fits the teacher, the share of student outputs and the rollout.

    Raises:
      ValueError: the divergence needs a teacher that is not set, or does not fit the outputs.
    """
    divergence = experiment.objective.divergence
    if divergence.needs_teacher and experiment.teacher is None:
        raise ValueError(
            f"{type(divergence).__name__} compares the student with a teacher; got "
            "Experiment.teacher = None. Set Experiment.teacher, or Objective.divergence to "
            "NegativeLogLikelihood() for fine-tuning."
        )
    parts = divergence.divergences if isinstance(divergence, WeightedSum) else (divergence,)
    fraction = experiment.outputs.student_data_fraction
    # If alpha is 0, the loss on the student's own outputs has the reward and no divergence.
    reward = experiment.reward
    is_measured = not (isinstance(reward, RewardMix) and reward.alpha == 0)
    has_likelihood = any(isinstance(part, NegativeLogLikelihood) for part in parts)
    if has_likelihood and fraction != 0 and is_measured:
        # Cross-entropy on one's own samples teaches nothing but to repeat them.
        raise ValueError(
            "NegativeLogLikelihood on the student's own outputs is no objective; got "
            f"{experiment.outputs}. Set OutputMix.student_data_fraction to 0, or choose a "
            "divergence to the teacher."
        )
    _check_per_example(experiment)
    if any(isinstance(part, SampledReverseKL) for part in parts):
        own = Sample(temperature=experiment.objective.student_temperature)
        if fraction != 1 or experiment.rollout.method != own:
            raise ValueError(
                "SampledReverseKL is an estimate for outputs drawn from the very distribution "
                f"that it measures; got {experiment.outputs} and {experiment.rollout.method}. Set "
                f"OutputMix.student_data_fraction to 1.0 and Rollout.method to {own}, or use "
                "ReverseKL."
            )


def _check_per_example(experiment: Experiment) -> None:
    rollout, lengths = experiment.rollout, experiment.train_data.feature_lengths
    target_length = rollout.target_length or lengths["targets"]
    if experiment.outputs.per_example and (rollout.num_samples, target_length) != (
        1, lengths["targets"],
    ):  # fmt: skip
        raise ValueError(
            "OutputMix.per_example puts one sample in the place of an example's output; got "
            f"Rollout.num_samples = {rollout.num_samples} and Rollout.target_length = "
            f"{rollout.target_length}. Set them to 1 and None, or per_example to False."
        )


def check_best_metric(experiment: Experiment) -> None:
    """Checks that there is an evaluation if `Checkpoints.best_metric` is set.

    Raises:
      ValueError: there is no evaluation.
    """
    name = experiment.checkpoints.best_metric
    if name is not None and experiment.evaluation is None:
        raise ValueError(
            f"Checkpoints.best_metric is measured by an evaluation; got {name!r} and "
            "Experiment.evaluation = None. Set Experiment.evaluation, or best_metric to None."
        )
