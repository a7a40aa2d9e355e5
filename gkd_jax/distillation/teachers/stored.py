"""A teacher of precomputed next-token distributions."""

import dataclasses

from gkd_jax.distillation.parameter_sources import Sources
from gkd_jax.distillation.teachers.networks import AbstractTeacher
from gkd_jax.models.base import LanguageModel


@dataclasses.dataclass(frozen=True)
class StoredTeacher(AbstractTeacher):
    """Distributions of a teacher over the data's targets, written by `--run_mode=store_teacher`.

    No network is loaded or run. The distributions cover only the targets of the data, so the
    student must be trained on these targets alone: `OutputMix.student_data_fraction` has to be 0.

    Attributes:
      path: folder with the distributions for the training data.
      evaluation_path: folder with the distributions for the evaluation data; None leaves the
        divergence out of evaluations.
    """

    path: str
    evaluation_path: str | None = None

    def describe(self, start: str) -> str:
        del start
        return self.path

    def model_for(self, student: LanguageModel) -> None:
        del student

    def parameter_sources(self, student: LanguageModel) -> Sources:
        del student
        return ()

    def store_for(self, data: str) -> str | None:
        return {"train_data": self.path, "eval_data": self.evaluation_path}[data]
