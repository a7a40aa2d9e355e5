"""Checks of where outputs come from: who writes them, and whether they are used again."""

from gkd_jax.experiment import Experiment
from gkd_jax.objectives.other_divergences import SampledReverseKL, WeightedSum


def check_policy(experiment: Experiment) -> None:
    """Refuses a rollout with a teacher's help where there is no such teacher.

    Raises:
      ValueError: naming what is missing.
    """
    policy, teacher = experiment.rollout.policy, experiment.teacher
    if policy is None:
        return
    if teacher is None or not experiment.objective.divergence.needs_teacher:
        missing = "Experiment.teacher = None"
        if teacher is not None:
            missing = f"{type(experiment.objective.divergence).__name__}, which reads no teacher"
        raise ValueError(
            f"Rollout.policy = {policy} lets a teacher into the rollout; got {missing}. Set "
            "Experiment.teacher and a divergence to it, or Rollout.policy to None."
        )
    student = experiment.student.model
    network = teacher.model_for(student)
    if network is None:
        raise ValueError(
            f"Rollout.policy = {policy} asks the teacher for its next token; got {teacher}, which "
            "holds what it said of the data's outputs. Set Rollout.policy to None."
        )
    if student.vocab_size == network.vocab_size:  # Otherwise said for the teacher itself.
        policy.combine(student, network)
    _check_not_estimated(experiment, f"Rollout.policy = {policy}", "Rollout.policy")


def check_replay(experiment: Experiment) -> None:
    """Refuses a replay buffer that would never be used, or that the step cannot take.

    Raises:
      ValueError: naming the setting.
    """
    replay, outputs = experiment.replay, experiment.outputs
    if replay is None:
        return
    if outputs.student_data_fraction == 0 or outputs.per_example:
        raise ValueError(
            "Experiment.replay takes the place of rollouts of whole batches; got "
            f"{outputs}. Set OutputMix.student_data_fraction above 0 and per_example to False, or "
            "Experiment.replay to None."
        )
    num_rows = experiment.train_data.batch_size * experiment.rollout.num_samples
    if replay.num_slots(num_rows) >= experiment.num_steps:
        raise ValueError(
            "Replay.capacity must be less than what all steps could sample, or no output is ever "
            f"used again; got {replay.capacity}, and {experiment.num_steps} steps of {num_rows} "
            "outputs. Set it lower."
        )
    _check_not_estimated(experiment, f"{replay}", "Experiment.replay")


def _check_not_estimated(experiment: Experiment, got: str, setting: str) -> None:
    divergence = experiment.objective.divergence
    parts = divergence.divergences if isinstance(divergence, WeightedSum) else (divergence,)
    if any(isinstance(part, SampledReverseKL) for part in parts):
        raise ValueError(
            "SampledReverseKL is an estimate for outputs that the student draws alone and now; "
            f"got {got}. Set {setting} to None, or use ReverseKL."
        )
