"""Checks of the outputs that are trained on: teacher assistance, packing, replay and rewards."""

from gkd_jax.data.batches import MAX_EXAMPLE_ID
from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.distillation.rewards import RewardMix
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.models.ensembles import RoutedModel
from gkd_jax.objectives.divergence_sums import WeightedSum
from gkd_jax.objectives.divergences import ReverseKL
from gkd_jax.objectives.other_divergences import SampledReverseKL
from gkd_jax.sampling.methods import Sample
from gkd_jax.sampling.teacher_assisted import TeacherMixed


def check_policy(experiment: Experiment) -> None:
    """Checks that the teacher can assist the rollout if `Rollout.teacher_assistance` is set.

    Raises:
      ValueError: no teacher is used in training, the teacher cannot predict the next token of the
        student's output, or the divergence needs outputs that the student samples without
        assistance.
    """
    assistance, teacher = experiment.rollout.teacher_assistance, experiment.teacher
    if assistance is None:
        return
    if teacher is None or not experiment.objective.divergence.needs_teacher:
        missing = "Experiment.teacher = None"
        if teacher is not None:
            missing = f"{type(experiment.objective.divergence).__name__}, which reads no teacher"
        raise ValueError(
            f"Rollout.teacher_assistance = {assistance} lets a teacher into the rollout; got "
            f"{missing}. Set Experiment.teacher and a divergence to it, or "
            "Rollout.teacher_assistance to None."
        )
    if teacher.own_tokens is not None:
        raise ValueError(
            f"Rollout.teacher_assistance = {assistance} asks the teacher for its next token; got "
            "CrossTokenizerTeacher, whose tokens are not the student's. Set "
            "Rollout.teacher_assistance to None."
        )
    student = experiment.student_model
    network = teacher.model_for(student)
    if network is None:
        raise ValueError(
            f"Rollout.teacher_assistance = {assistance} asks the teacher for its next token; got "
            f"{teacher}, which holds what it said of the data's outputs. Set "
            "Rollout.teacher_assistance to None."
        )
    if experiment.train_data.teacher_chat is not None:
        raise ValueError(
            f"Rollout.teacher_assistance = {assistance} lets student and teacher go on from one "
            "prompt; got DatasetConfig.teacher_chat, which gives the teacher its own. Set one of "
            "the two to None."
        )
    if isinstance(network, RoutedModel):
        raise ValueError(
            f"Rollout.teacher_assistance = {assistance} asks the teacher for its next token; got "
            "RoutedTeachers, which score outputs only. Set Rollout.teacher_assistance to None."
        )
    assistance.combine(student, network)
    setting = "Rollout.teacher_assistance"
    _check_not_estimated(experiment, f"{setting} = {assistance}", setting)


def check_packing(experiment: Experiment) -> None:
    """Checks that data are not packed if the student answers their prompts.

    Raises:
      ValueError: rows are packed and student outputs are used, or evaluation data are packed.
    """
    outputs, evaluation = experiment.outputs, experiment.evaluation
    if experiment.train_data.pack and outputs.student_data_fraction != 0:
        raise ValueError(
            "DatasetConfig.pack packs the data's outputs; the student writes its own to one prompt "
            f"a row; got {outputs}. Set OutputMix.student_data_fraction (STUDENT_DATA_FRACTION) to "
            "0.0, or DatasetConfig.pack to False."
        )
    if evaluation is not None:
        check_not_packed("Evaluation.data", evaluation.data)


def check_not_packed(setting: str, data: DatasetConfig) -> None:
    """Checks that data are not packed, since a model is to answer their prompts.

    Each row must have one prompt.

    Args:
      setting: the setting that has the data, for messages.
      data: the data.

    Raises:
      ValueError: the data are packed.
    """
    if data.pack:
        raise ValueError(
            f"DatasetConfig.pack is of training; got True in {setting}, whose prompts are answered "
            "one a row. Set it for the training's data alone: "
            "train/data.DatasetConfig.pack = True."
        )


def check_replay(experiment: Experiment) -> None:
    """Checks that the replay buffer is used, and fits the objective.

    Raises:
      ValueError: no step samples a whole batch of outputs, no output would be replayed, or the
        divergence needs outputs of the current student.
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


def check_reward(experiment: Experiment) -> None:
    """Checks that the reward is used, and that its gradient is unbiased.

    Raises:
      ValueError: no step samples a whole batch of outputs, the outputs do not come from the current
        student's own distribution, or the objective does not fit the reward.
    """
    reward, outputs = experiment.reward, experiment.outputs
    if experiment.objective.divergence.needs_advantages:
        raise ValueError(
            "Objective.divergence needs advantages, which come with Experiment.reward alone; got "
            f"{experiment.objective.divergence}. Set it to the divergence without PolicyGradient."
        )
    if reward is None:
        return
    if outputs.student_data_fraction == 0 or outputs.per_example:
        raise ValueError(
            f"Experiment.reward is that of whole batches of the student's outputs; got {outputs}. "
            "Set OutputMix.student_data_fraction above 0 (1.0 is RL at every step) and per_example "
            "to False, or Experiment.reward to None."
        )
    if experiment.replay is not None:
        raise ValueError(
            "Experiment.reward is learnt from outputs that are drawn now; got Experiment.replay = "
            f"{experiment.replay}. Set Experiment.replay to None."
        )
    teacher = experiment.teacher
    if teacher is not None and teacher.own_tokens is not None:
        raise ValueError(
            "Experiment.reward weighs the student's tokens one by one; got CrossTokenizerTeacher, "
            "which judges spans of them. Set Experiment.reward to None, or take a teacher with the "
            "student's vocabulary."
        )
    if isinstance(reward, RewardMix):
        _check_reward_mix(experiment, reward)
    else:
        _check_sequence_reverse_kl(experiment)


def _check_reward_mix(experiment: Experiment, reward: RewardMix) -> None:
    rollout = experiment.rollout
    if reward.baseline != "none" and rollout.num_samples < 2:
        raise ValueError(
            f"RewardMix.baseline = {reward.baseline!r} compares the samples of one prompt; got "
            f"Rollout.num_samples = {rollout.num_samples}. Set Rollout.num_samples to 2 or more, "
            "or RewardMix.baseline to 'none'."
        )
    own = Sample(temperature=experiment.objective.student_temperature)
    if reward.alpha < 1.0 and (rollout.method != own or rollout.teacher_assistance is not None):
        raise ValueError(
            "RewardMix needs outputs drawn from the very distribution that learns; got "
            f"Rollout.method = {rollout.method} and Rollout.teacher_assistance = "
            f"{rollout.teacher_assistance}. Set them to "
            f"{own} and None."
        )
    num_rows = experiment.num_steps * experiment.train_data.batch_size
    if num_rows >= MAX_EXAMPLE_ID:
        raise ValueError(
            "RewardMix finds the texts of a prompt by its position in the training data, "
            f"which must stay below {MAX_EXAMPLE_ID}; got {experiment.num_steps} steps of "
            f"{experiment.train_data.batch_size} examples. Set Experiment.num_steps lower."
        )


def _check_sequence_reverse_kl(experiment: Experiment) -> None:
    objective, rollout = experiment.objective, experiment.rollout
    temperatures = (objective.student_temperature, objective.teacher_temperature)
    if not isinstance(objective.divergence, ReverseKL) or temperatures != (1.0, 1.0):
        raise ValueError(
            "SequenceReverseKL adds to the reverse KL of each token what follows it, at "
            f"temperatures of 1; got {objective}. Set Objective.divergence to ReverseKL() and both "
            "temperatures to 1.0, or Experiment.reward to None."
        )
    assistance = rollout.teacher_assistance
    is_known = assistance is None or isinstance(assistance, TeacherMixed)
    if rollout.method != Sample() or not is_known:
        raise ValueError(
            "SequenceReverseKL knows the importance of outputs that the student, or its mixture "
            f"with the teacher, draws; got Rollout.method = {rollout.method} and "
            f"Rollout.teacher_assistance = {assistance}. Set them to Sample(), and to None or "
            "TeacherMixed()."
        )


def _check_not_estimated(experiment: Experiment, got: str, setting: str) -> None:
    divergence = experiment.objective.divergence
    parts = divergence.divergences if isinstance(divergence, WeightedSum) else (divergence,)
    if any(isinstance(part, SampledReverseKL) for part in parts):
        raise ValueError(
            "SampledReverseKL is an estimate for outputs that the student draws alone and now; "
            f"got {got}. Set {setting} to None, or use ReverseKL."
        )
