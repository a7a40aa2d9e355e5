"""Teachers made from the student itself: the initial, the averaged and the live student."""

import dataclasses

from gkd_jax.distillation.parameter_sources import Average, FrozenBase, Initial, Live, Sources
from gkd_jax.distillation.teachers.networks import AbstractTeacher
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel


class SelfTeacher(AbstractTeacher):
    """A teacher that is the student at some time of the run. It uses the student's model."""

    def model_for(self, student: LanguageModel) -> LanguageModel:
        return student


@dataclasses.dataclass(frozen=True)
class InitialStudent(SelfTeacher):
    """The student as it was before training, frozen and in its compute dtype.

    Its parameters are loaded again at every start of the run: restored from
    `Student.initial_checkpoint`, or initialized from the run's seed if there is none. They are not
    saved, so the checkpoint must not change. If the checkpoint belongs to a run that is still
    training, name one of that run's `checkpoint_<step>` folders. For a student with adapters
    (`LoRA`) the teacher is the base without adapters and uses the student's arrays, so that no
    second copy is kept.

    If both temperatures are equal and there is no dropout, the gradient of the first step is 0.
    Combined with another loss, or at a different teacher temperature, this teacher keeps the
    student near its starting point.
    """

    def describe(self, start: str) -> str:
        return f"{start}, as the student starts"

    def model_for(self, student: LanguageModel) -> LanguageModel:
        return lora.base_of(student)

    def parameter_sources(self, student: LanguageModel) -> Sources:
        return (FrozenBase() if lora.has_adapters(student) else Initial(),)


@dataclasses.dataclass(frozen=True)
class AverageStudent(SelfTeacher):
    """The exponential moving average of the student.

    a_n = decay * a_(n-1) + (1 - decay) * theta_n, with a_0 = theta_0.

    The average is updated after every step. It is stored in float32 in the training state and in
    checkpoints, and is as large as the student's trainable parameters.

    Attributes:
      decay: decay per update, above 0 and below 1; the average covers about the last
        1 / (1 - decay) updates.

    Raises:
      ValueError: the decay is out of range.

    References:
      "Mean teachers are better role models: Weight-averaged consistency targets improve
      semi-supervised deep learning results", arXiv 1703.01780.
      "Self-Distillation Enables Continual Learning" (SDFT, a language model that is taught by its
      own average), arXiv 2601.19897.
    """

    decay: float

    def __post_init__(self) -> None:
        is_number = isinstance(self.decay, (int, float)) and not isinstance(self.decay, bool)
        if not (is_number and 0.0 < self.decay < 1.0):
            raise ValueError(
                f"AverageStudent.decay must be above 0 and below 1; got {self.decay!r}. Set it to "
                "e.g. 0.999; of the student itself use LiveStudent, of the frozen one "
                "InitialStudent."
            )

    def describe(self, start: str) -> str:
        del start
        return f"the student's average of decay {self.decay}"

    def parameter_sources(self, student: LanguageModel) -> Sources:
        del student
        return (Average(self.decay),)


@dataclasses.dataclass(frozen=True)
class LiveStudent(SelfTeacher):
    """The student itself at every step, without dropout and without gradient.

    The divergence has a gradient only if the distributions of teacher and student differ. They
    differ if the teacher reads another prompt, if the student has dropout, or if the teacher
    temperature is below the student's, which sharpens the student's own distributions.
    """

    def describe(self, start: str) -> str:
        del start
        return "the student itself at every step"

    def parameter_sources(self, student: LanguageModel) -> Sources:
        del student
        return (Live(),)
