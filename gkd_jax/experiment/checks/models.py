"""Checks of the student and the teacher: their vocabularies and the checkpoints they start from."""

from collections.abc import Mapping

from gkd_jax.checkpoints import load, manager
from gkd_jax.data.vocabularies import Vocabulary, check_same_vocabulary
from gkd_jax.distillation.parameter_sources import FrozenBase, Initial, state_fields
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment.checks import adapters
from gkd_jax.experiment.checks.checkpoints import check_checkpoint
from gkd_jax.experiment.checks.vocabularies import check_own_tokens, check_padding, check_vocab_size
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.problems import Problems
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel


class ModelChecks:
    """Checks of the models of one experiment. Each method records problems and does not raise.

    Methods with the suffix `_to_train` are for training, which starts from the student's initial
    checkpoint. Methods with the suffix `_to_use` are for the other run modes, which restore the
    student from the newest checkpoint of the run.
    """

    def __init__(
        self, experiment: Experiment, made_before: Mapping[str, LanguageModel], problems: Problems
    ):
        """Makes the checks.

        Args:
          experiment: the experiment.
          made_before: model of each checkpoint that another run of a study will write, by the
            checkpoint's path.
          problems: collection to which problems are added.
        """
        self._experiment = experiment
        self._made_before = made_before
        self._problems = problems

    def student_to_train(self, vocabulary: Vocabulary) -> None:
        """Checks the student's output layer and initial checkpoint."""
        with self._problems.collecting():
            check_vocab_size(self._experiment.student.model, vocabulary)
        self._initial_checkpoint(vocabulary)

    def teacher_to_train(self, vocabulary: Vocabulary) -> None:
        """Checks every network of the teacher.

        Also checks the student's initial checkpoint if the teacher reads its parameters: if the
        teacher is the initial student or the frozen base of the student.
        """
        if self._experiment.teacher is None:
            return
        own = self._experiment.teacher.own_tokens
        if own is not None:
            with self._problems.collecting():
                check_own_tokens(self._experiment, self._experiment.train_data.vocabulary)
            vocabulary = own.vocabulary
        for network in self._experiment.teacher.networks:
            self._network(network, vocabulary)
        sources = self._experiment.teacher.parameter_sources(self._experiment.student.model)
        if any(isinstance(source, Initial | FrozenBase) for source in sources):
            self._initial_checkpoint(vocabulary)

    def student_to_use(self, vocabulary: Vocabulary) -> None:
        """Checks the run's newest checkpoint or, if there is none, the initial checkpoint."""
        experiment, collecting = self._experiment, self._problems.collecting
        with collecting():
            check_vocab_size(experiment.student.model, vocabulary)
        with collecting():
            if manager.newest_step(experiment.model_dir) is not None:
                self._checkpoint(
                    "Experiment.model_dir", experiment.model_dir, experiment.student.model,
                    vocabulary,
                )  # fmt: skip
                adapters.check_base(experiment)
                if lora.has_adapters(experiment.student.model):
                    self._initial_checkpoint(vocabulary)
            elif experiment.student.initial_checkpoint is None:
                raise ValueError(no_student(experiment))
            else:
                self._initial_checkpoint(vocabulary)

    def teacher_to_use(self, vocabulary: Vocabulary) -> None:
        """Checks the teacher's networks, and the fields of the train state that the teacher reads.

        The newest checkpoint of the run must contain these fields.
        """
        experiment, teacher = self._experiment, self._experiment.teacher
        self.teacher_to_train(vocabulary)
        if teacher is None:
            return
        fields = state_fields(teacher.parameter_sources(experiment.student.model))
        if not fields:
            return
        self.student_to_use(vocabulary)
        with self._problems.collecting():
            if manager.newest_step(experiment.model_dir) is not None:
                model = experiment.student.model
                trained, _ = lora.split(model, model.abstract_params())
                for field in fields:
                    load.check_compatible(experiment.model_dir, trained, field=field)

    def _initial_checkpoint(self, vocabulary: Vocabulary) -> None:
        student = self._experiment.student
        if student.initial_checkpoint is None:
            return
        with self._problems.collecting():
            self._checkpoint(
                "Student.initial_checkpoint", student.initial_checkpoint,
                lora.base_of(student.model), vocabulary,
            )  # fmt: skip

    def _network(self, teacher: Teacher, vocabulary: Vocabulary) -> None:
        student, collecting = self._experiment.student, self._problems.collecting
        is_known = teacher.vocabulary is not None
        with collecting():
            is_known |= self._checkpoint(
                "Teacher.checkpoint", teacher.checkpoint, teacher.model, vocabulary
            )
        with collecting():
            check_padding(student.model, teacher, vocabulary, is_known=is_known)
        with collecting():
            check_vocab_size(teacher.model, vocabulary, whose="teacher")
        with collecting():
            if teacher.vocabulary is not None:
                check_same_vocabulary(vocabulary, teacher.vocabulary)

    def _checkpoint(
        self, setting: str, path: str, model: LanguageModel, vocabulary: Vocabulary
    ) -> bool:
        return check_checkpoint(setting, path, model, vocabulary, made_before=self._made_before)


def no_student(experiment: Experiment) -> str:
    """Returns the error message for a run that has no student parameters to use."""
    return (
        f"there is no checkpoint in Experiment.model_dir ({experiment.model_dir}), and "
        "Student.initial_checkpoint is None. Set MODEL_DIR to a run's folder, or "
        "Student.initial_checkpoint to a checkpoint."
    )
