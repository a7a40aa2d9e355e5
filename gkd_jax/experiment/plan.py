"""Description of a run in a few lines of text."""

import jax

from gkd_jax.experiment.checks import adapters
from gkd_jax.experiment.checks.vocabularies import describe_own_tokens, describe_padding
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.prepare import Prepared
from gkd_jax.models.base import LanguageModel


def num_params(model: LanguageModel) -> int:
    """Counts a model's parameters without allocating them."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params()))


def describe_plan(experiment: Experiment, prepared: Prepared) -> str:
    """Describes a run: models, objective, outputs, optimizer, steps, data and evaluation."""
    student, teacher = experiment.student, experiment.teacher
    lines = [f"student: {num_params(student.model):,} parameters, from {experiment.start}"]
    teacher_model = experiment.teacher_model
    if teacher is not None:
        used = "" if experiment.objective.divergence.needs_teacher else " (not used in training)"
        size = "stored" if teacher_model is None else f"{num_params(teacher_model):,} parameters"
        lines.append(f"teacher: {size}, from {teacher.describe(experiment.start)}{used}")
        if prepared.train_data is not None and prepared.train_data.stored_teacher is not None:
            lines.append(f"  {prepared.train_data.stored_teacher}")
    vocabulary = experiment.train_data.vocabulary
    for line in (describe_padding(experiment), describe_own_tokens(experiment, vocabulary)):
        if line is not None:
            lines.append(line)
    lines.append(f"objective: {experiment.objective}")
    sampled = experiment.outputs.student_data_fraction != 0
    lines.append(
        f"outputs: {experiment.outputs}" + (f", sampled by {experiment.rollout}" if sampled else "")
    )
    if experiment.reward is not None:
        lines.append(f"reward: {experiment.reward}")
    if experiment.replay is not None:
        lines.append(f"replay: {experiment.replay}")
    lines += [f"optimizer: {experiment.optimizer}", adapters.describe_memory(experiment)]
    lines.append(
        f"steps: {experiment.num_steps:,} of {experiment.train_data.batch} in "
        f"{experiment.num_microbatches} microbatches, on a mesh of "
        f"{dict(experiment.partitioner.mesh.shape)}"
    )
    if prepared.train_data is not None:
        num_examples = experiment.num_steps * prepared.train_data.examples_per_batch
        passes = num_examples / prepared.train_data.num_examples
        lines.append(f"training data, {passes:.2f} passes: {prepared.train_data.describe()}")
    if experiment.evaluation is not None and prepared.eval_data is not None:
        lines.append(
            f"evaluation: {prepared.eval_data.num_examples:,} examples every "
            f"{experiment.evaluation.period:,} steps, {experiment.evaluation.method}"
        )
    return "\n".join(lines)
