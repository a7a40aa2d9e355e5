"""Checks that output layers fit their vocabularies, and that teacher and student fit each other."""

from gkd_jax.data.vocabularies import Vocabulary, check_same_vocabulary
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.step_objectives import measured_objective
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.spans import SpanObjective


def check_vocab_size(
    model: LanguageModel, vocabulary: Vocabulary, *, whose: str = "student"
) -> None:
    """Checks that a model's output layer has an entry for each id of its vocabulary.

    Raises:
      ValueError: the output layer has fewer entries than the vocabulary has ids.
    """
    if model.vocab_size < vocabulary.size:
        raise ValueError(
            f"the {whose}'s vocab_size must be at least that of its vocabulary; got "
            f"{model.vocab_size} and {vocabulary.size} ({vocabulary.name}). "
            f"Set vocab_size of the {whose}'s model to {vocabulary.size} or more."
        )


def check_padding(
    student: LanguageModel, teacher: Teacher, vocabulary: Vocabulary, *, is_known: bool
) -> None:
    """Checks that the vocabularies were compared if the two output layers differ in size.

    Without the comparison, the additional entries of the larger output layer may be tokens and not
    padding.

    Args:
      student: student's model.
      teacher: one of the experiment's teacher networks.
      vocabulary: student's vocabulary.
      is_known: whether the teacher's vocabulary was compared with the student's.

    Raises:
      ValueError: the sizes differ and the vocabularies were not compared.
    """
    if is_known or teacher.model.vocab_size == student.vocab_size:
        return
    raise ValueError(
        "teacher and student have output layers of different size, and nothing tells that their "
        f"first entries mean the same; got {teacher.model.vocab_size} (teacher) and "
        f"{student.vocab_size} (student) over {vocabulary.size} ids of {vocabulary.name}. If they "
        "differ by padding alone, set Teacher.vocabulary to the teacher's own vocabulary, which is "
        "then compared with the student's. Otherwise take models over one vocabulary."
    )


def check_own_tokens(experiment: Experiment, vocabulary: Vocabulary) -> None:
    """Checks that a `CrossTokenizerTeacher` is needed and can be compared with the student.

    It is needed only if the teacher's vocabulary differs from the student's.

    Args:
      experiment: the experiment.
      vocabulary: student's vocabulary.

    Raises:
      ValueError: rows are packed, the vocabularies are the same, or they cannot be compared.
    """
    own = None if experiment.teacher is None else experiment.teacher.own_tokens
    if own is None or not experiment.objective.divergence.needs_teacher:
        return
    if experiment.train_data.pack:
        raise ValueError(
            "DatasetConfig.pack is True, and CrossTokenizerTeacher reads rows of one example. Set "
            "DatasetConfig.pack to False."
        )
    try:
        check_same_vocabulary(vocabulary, own.vocabulary)
    except ValueError:
        measured_objective(experiment, vocabulary)
        return
    raise ValueError(
        "CrossTokenizerTeacher is for a teacher with another vocabulary; got "
        f"{own.vocabulary.name}, which is the student's own. Set Experiment.teacher to the Teacher "
        "alone."
    )


def describe_own_tokens(experiment: Experiment, vocabulary: Vocabulary) -> str | None:
    """Describes how a `CrossTokenizerTeacher` is compared with the student.

    Returns None if training uses no such teacher.
    """
    objective = measured_objective(experiment, vocabulary)
    if not isinstance(objective, SpanObjective) or objective.vocabularies is None:
        return None
    classes = objective.vocabularies.student.num_classes
    return (
        f"tokens: the teacher reads its own, compared on spans of equal text, over {classes:,} "
        f"texts that are tokens of both ({vocabulary.size:,} of the student's)"
    )


def describe_padding(experiment: Experiment) -> str | None:
    """Describes the entries that are cut off from output layers of different size.

    Returns None if the sizes are equal or training uses no teacher.
    """
    student, teacher = experiment.student.model, experiment.teacher
    if teacher is None or not experiment.objective.divergence.needs_teacher:
        return None
    sizes = teacher.vocab_sizes
    common = min((student.vocab_size, *sizes))
    if all(size == common for size in (student.vocab_size, *sizes)):
        return None
    whose = ", ".join(f"{size:,}" for size in sizes)
    line = (
        f"padding: output layers of {student.vocab_size:,} (student) and {whose} (teacher) "
        f"entries; divergences and the training's samples are over the first {common:,}, which "
        "all have, and what lies beyond is cut off and the rest made to sum to 1"
    )
    if student.vocab_size > common:
        line += (
            f". The student's last {student.vocab_size - common:,} are not trained: what "
            "probability they have, they keep. A student that starts from scratch is better given "
            f"vocab_size = {common}"
        )
    return line
