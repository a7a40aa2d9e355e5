"""Who writes the outputs of a rollout besides the student: teachers that help it along."""

import dataclasses
from typing import Protocol

from gkd_jax.models.base import LanguageModel
from gkd_jax.models.combined import CorrectedModel, MixtureModel


class Policy(Protocol):
    """Makes one model, which writes the outputs, of the student's and the teacher's."""

    def combine(self, student: LanguageModel, teacher: LanguageModel) -> LanguageModel:
        """A model whose parameters are the tuple of the student's and the teacher's."""
        ...


@dataclasses.dataclass(frozen=True)
class TeacherMixed:
    """At every token the teacher's distribution is mixed in: MiniLLM (arXiv 2306.08543, 2.2).

    It keeps a weak student from outputs that collapse. A sampling method's temperature and cuts
    act on the mixture.

    Attributes:
      teacher_share: between 0 and 1, ends excluded; the paper takes 0.2.

    Raises:
      ValueError: the share is outside (0, 1).
    """

    teacher_share: float = 0.2

    def __post_init__(self) -> None:
        share = self.teacher_share
        if not (isinstance(share, (int, float)) and 0.0 < share < 1.0):
            raise ValueError(
                f"TeacherMixed.teacher_share must be between 0 and 1, ends excluded; got {share!r}."
                " Set Rollout.policy to None for the student alone."
            )

    def combine(self, student: LanguageModel, teacher: LanguageModel) -> MixtureModel:
        """(1 - teacher_share) Q + teacher_share P."""
        return MixtureModel(
            (student, teacher), weights=(1.0 - self.teacher_share, self.teacher_share)
        )


@dataclasses.dataclass(frozen=True)
class Corrected:
    """The student proposes, the teacher replaces: speculative KD (arXiv 2410.11325).

    A token that is not among the teacher's `top_k` best is drawn again from the teacher. That is
    exact at a sampling temperature of 1; another temperature, top-k or top-p of the sampling
    method act on the distribution that results.

    Attributes:
      top_k: K; the paper takes 25.

    Raises:
      ValueError: K is not a whole number from 1.
    """

    top_k: int = 25

    def __post_init__(self) -> None:
        if not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(
                f"Corrected.top_k must be a whole number from 1 on; got {self.top_k!r}. The paper "
                "takes 25."
            )

    def combine(self, student: LanguageModel, teacher: LanguageModel) -> CorrectedModel:
        """The model that `CorrectedModel` describes."""
        return CorrectedModel((student, teacher), top_k=self.top_k)
