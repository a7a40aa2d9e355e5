"""Who teaches. The teacher's parameters are an argument of every jitted function that uses them."""

import dataclasses

from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.models.base import LanguageModel


@dataclasses.dataclass(frozen=True)
class Teacher:
    """One frozen network, restored in its compute dtype, without optimizer state, never saved.

    Attributes:
      model: the teacher's model; its output layer must have the student's size.
      checkpoint: a checkpoint of gkd_jax (a run's directory or one step of it) or of T5X.
      vocabulary: the teacher's own vocabulary, if it is at hand: it is then compared with the
        student's, entry by entry. None takes it on trust that the two are the same.
    """

    model: LanguageModel
    checkpoint: str
    vocabulary: Vocabulary | None = None
