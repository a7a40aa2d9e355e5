"""The objectives that training steps minimise: on the data's outputs and on the student's own."""

import dataclasses
import functools
from typing import Any

import numpy as np

from gkd_jax.data.common_text import CommonText, Table, common_text
from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.distillation.rewards import RewardMix
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.objectives.objective import Objective
from gkd_jax.objectives.policy_gradient import with_policy_gradient, with_returns
from gkd_jax.objectives.spans import SpanObjective
from gkd_jax.objectives.token_classes import Classes, Vocabularies


def measured_objective(experiment: Experiment, vocabulary: Vocabulary) -> Objective:
    """Returns the objective without a reward.

    If the teacher has its own tokenizer, the objective compares spans of equal text, not tokens.

    Args:
      experiment: the experiment.
      vocabulary: student's vocabulary.

    Raises:
      ValueError: the vocabularies of student and teacher cannot be compared, or the objective
        cannot be computed on spans.
    """
    objective = experiment.objective
    common = common_text_of(experiment, vocabulary)
    if common is None:
        return objective
    names = [field.name for field in dataclasses.fields(Objective)]
    settings: dict[str, Any] = {name: getattr(objective, name) for name in names}
    return SpanObjective(**settings, vocabularies=_vocabularies(common))


def on_policy_objective(experiment: Experiment) -> Objective:
    """Returns the objective of a step on the student's own outputs, including any reward."""
    objective, reward = experiment.objective, experiment.reward
    if reward is None:
        return measured_objective(experiment, experiment.train_data.vocabulary)
    if isinstance(reward, RewardMix):
        return with_policy_gradient(objective, reward.alpha)
    return with_returns(objective)


def common_text_of(experiment: Experiment, vocabulary: Vocabulary) -> CommonText | None:
    """Returns the texts that are tokens of both student and teacher.

    Returns None if the teacher has no tokenizer of its own, or training uses no teacher.
    """
    teacher, model = experiment.teacher, experiment.teacher_model
    if teacher is None or model is None or not experiment.objective.divergence.needs_teacher:
        return None
    own = teacher.own_tokens
    if own is None:
        return None
    sizes = (experiment.student.model.vocab_size, model.vocab_size)
    # Typed as Any: the cached `common_text` accepts only hashable types. mypy does not know that
    # vocabularies, which are frozen dataclasses, are hashable.
    both: Any = (vocabulary, own.vocabulary)
    return common_text(*both, sizes)


@functools.lru_cache(maxsize=8)
def _vocabularies(common: CommonText) -> Vocabularies:
    """Returns the token classes of student and teacher for a `SpanObjective`.

    Cached, so that equal arguments give the same object. Functions that were compiled for the
    object are then not compiled again.
    """

    def both(table: Table) -> tuple[Classes, Classes]:
        rest = len(table.numbers)
        student, teacher = (
            Classes(np.where(one == rest, common.num_classes, one), common.num_classes)
            for one in (table.student, table.teacher)
        )
        return student, teacher

    first = None if common.first is common.table else both(common.first)
    return Vocabularies(*both(common.table), first)
