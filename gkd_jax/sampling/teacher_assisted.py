"""Teacher-assisted sampling: outputs that the student samples with the teacher's help."""

import dataclasses
from typing import Any, Protocol

from gkd_jax.common.moved import load_moved
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.ensembles import CorrectedModel, MixtureModel


class TeacherAssistance(Protocol):
    """Combines the student and the teacher into one model, from which outputs are sampled."""

    def combine(self, student: LanguageModel, teacher: LanguageModel) -> LanguageModel:
        """Returns a model whose parameters are the tuple (student's, teacher's)."""
        ...


@dataclasses.dataclass(frozen=True)
class TeacherMixed:
    """Samples each token from a mixture of the student's and the teacher's distributions.

    This is teacher-mixed sampling as in "MiniLLM: Knowledge Distillation of Large Language Models"
    (arXiv 2306.08543, section 2.2). It prevents a weak student from generating degenerate outputs.
    The temperature, top-k and top-p of the sampling method apply to the mixture.

    Attributes:
      teacher_share: weight of the teacher's distribution, in the open interval (0, 1); the paper
        uses 0.2.

    Raises:
      ValueError: `teacher_share` is outside (0, 1).
    """

    teacher_share: float = 0.2

    def __post_init__(self) -> None:
        share = self.teacher_share
        if not (isinstance(share, (int, float)) and 0.0 < share < 1.0):
            raise ValueError(
                f"TeacherMixed.teacher_share must be between 0 and 1, ends excluded; got {share!r}."
                " Set Rollout.teacher_assistance to None for the student alone."
            )

    def combine(self, student: LanguageModel, teacher: LanguageModel) -> MixtureModel:
        """Returns the mixture (1 - teacher_share) * student + teacher_share * teacher."""
        return MixtureModel(
            (student, teacher), weights=(1.0 - self.teacher_share, self.teacher_share)
        )


@dataclasses.dataclass(frozen=True)
class Corrected:
    """Samples each token from the student, and replaces tokens that the teacher finds unlikely.

    This is interleaved sampling as in "Speculative Knowledge Distillation: Bridging the
    Teacher-Student Gap Through Interleaved Sampling" (arXiv 2410.11325). A token that is not among
    the teacher's `top_k` most likely tokens is replaced by a token sampled from the teacher.
    The combined model computes the distribution of a token after this replacement. Sampling from
    the combined model at temperature 1, without top-k and top-p, is exactly this procedure. The
    temperature, top-k and top-p of the sampling method, if set, apply to the combined model. They
    are independent of the attribute `top_k`.

    Attributes:
      top_k: number of the teacher's most likely tokens that are not replaced; the paper uses 25.

    Raises:
      ValueError: `top_k` is not a positive integer.
    """

    top_k: int = 25

    def __post_init__(self) -> None:
        if not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(
                f"Corrected.top_k must be a whole number from 1 on; got {self.top_k!r}. The paper "
                "takes 25."
            )

    def combine(self, student: LanguageModel, teacher: LanguageModel) -> CorrectedModel:
        """Returns a model of a token's distribution after replacement, see `CorrectedModel`."""
        return CorrectedModel((student, teacher), top_k=self.top_k)


def __getattr__(name: str) -> Any:
    return load_moved(__name__, name)
