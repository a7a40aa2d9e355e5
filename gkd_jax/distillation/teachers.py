"""Who teaches: other networks, one or several, the student at another time, or what was stored.

A kind of teacher says these things, and nothing else asks which kind it is: its model; what is
restored before training and then handed to every jitted function as an argument; where it is
made from the run itself, which part of the training state it is; and, where it has no model, which
files hold what it says of the data's outputs.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.combined import MixtureModel, RoutedModel
from gkd_jax.models.lora import base_of
from gkd_jax.models.narrowed import narrowed
from gkd_jax.models.quantised import Int8


class AbstractTeacher(abc.ABC):
    """What every kind of teacher tells of itself. It never drops out and gets no gradient."""

    @abc.abstractmethod
    def source(self, start: str) -> str:
        """Where its parameters come from, as text; `start` tells it of the initial student."""

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Sizes of the output layers of networks of its own; of a student's teacher none."""
        return ()

    @abc.abstractmethod
    def model_for(self, student: LanguageModel) -> LanguageModel | None:
        """The model that teaches this student's model, over no more entries than it has.

        None where only what it said is kept.
        """

    @abc.abstractmethod
    def restore(
        self, *, network: Callable[["Teacher"], Any], initial_student: Callable[[], Any]
    ) -> Any:
        """Puts together what is restored before training, from what its sources give.

        Args:
          network: gives the parameters of one network; called for each.
          initial_student: gives those that the student starts with.

        Returns:
          Parameters of `model_for`; None for a teacher in the training state.
        """

    @property
    def state_part(self) -> str | None:
        """The field of `TrainState` that teaches; None for a teacher that is restored."""
        return None

    @property
    def average_decay(self) -> float | None:
        """The decay of the average that the run keeps in its state; None for no average."""
        return None

    @property
    def own_tokens(self) -> "CrossTokenizerTeacher | None":
        """How it reads text in its own tokens; None for one that reads the student's."""
        return None

    @property
    def num_sources(self) -> int | None:
        """How many sources the data's mixture has, where they decide who teaches; else None."""
        return None

    def store_for(self, data: str) -> str | None:
        """The folder of its distributions for 'train_data' or 'eval_data'; None where it has none.

        Only a teacher without a model has any.
        """
        del data
        return None


@dataclasses.dataclass(frozen=True)
class Teacher(AbstractTeacher):
    """One frozen network, restored in its compute dtype, without optimizer state, never saved.

    Attributes:
      model: the teacher's model. Where its output layer is padded to another size than the
        student's, the two are compared over the entries that both have.
      checkpoint: a checkpoint of gkd_jax (a run's directory or one step of it) or of T5X.
      vocabulary: the teacher's own vocabulary, if it is at hand: it is then compared with the
        student's, entry by entry. None takes it on trust that the two are the same, where the
        output layers have one size and the checkpoint does not tell.
      weights: 'int8' keeps the weights of the products in int8 (`models.quantised`), half the
        memory of bfloat16; None keeps all in the compute dtype.

    Raises:
      ValueError: another kind of weights.
    """

    model: LanguageModel
    checkpoint: str
    vocabulary: Vocabulary | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights not in (None, "int8"):
            raise ValueError(
                f"Teacher.weights must be None or 'int8'; got {self.weights!r}. Set it to 'int8' "
                "to halve the teacher's memory, or leave it out."
            )

    @property
    def network(self) -> LanguageModel:
        """The model that runs: `model`, with its weights as they are kept."""
        return self.model if self.weights is None else Int8(self.model)

    def source(self, start: str) -> str:
        """The checkpoint, and how its weights are kept."""
        del start
        return self.checkpoint + ("" if self.weights is None else f" in {self.weights}")

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """That of its model."""
        return (self.model.vocab_size,)

    def model_for(self, student: LanguageModel) -> LanguageModel:
        """Its own."""
        return narrowed(self.network, student.vocab_size)

    def restore(
        self, *, network: Callable[["Teacher"], Any], initial_student: Callable[[], Any]
    ) -> Any:
        """Its own parameters."""
        del initial_student
        return network(self)


@dataclasses.dataclass(frozen=True)
class CrossTokenizerTeacher(AbstractTeacher):
    """One frozen network with a vocabulary of its own: it reads the same text in its own tokens.

    Divergences are those of spans of equal text (`objectives.spans`).

    Attributes:
      teacher: the network, with its `vocabulary`.
      inputs_length: longest prompt in its tokens; None as many as the student's.
      targets_length: longest output in its tokens; None as many as the student's. What is cut
        teaches nothing.
      inputs_eos: whether its prompts end with the end of sequence; None as the student's do.
      inputs_bos: whether its prompts begin with the beginning of sequence.

    Raises:
      ValueError: the teacher is no `Teacher`, or has no vocabulary; a length is too short.
    """

    teacher: Teacher
    inputs_length: int | None = None
    targets_length: int | None = None
    inputs_eos: bool | None = None
    inputs_bos: bool = False

    def __post_init__(self) -> None:
        _checked_teachers(type(self), (self.teacher,))
        if self.teacher.vocabulary is None:
            raise ValueError(
                "CrossTokenizerTeacher reads text in the tokens of its own vocabulary; got "
                "Teacher.vocabulary = None. Set it to the teacher's."
            )
        for name in ("inputs_length", "targets_length"):
            length = getattr(self, name)
            if length is not None and length < 2:
                raise ValueError(
                    f"CrossTokenizerTeacher.{name} must be at least 2; got {length}. Set it to the "
                    "longest text in the teacher's tokens plus one."
                )

    @property
    def own_tokens(self) -> "CrossTokenizerTeacher":
        """Itself."""
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        """The network's."""
        assert self.teacher.vocabulary is not None
        return self.teacher.vocabulary

    def source(self, start: str) -> str:
        """The network's, and its vocabulary."""
        return f"{self.teacher.source(start)}, which reads {self.vocabulary.name}"

    def model_for(self, student: LanguageModel) -> LanguageModel:
        """The network's, all of it."""
        del student
        return self.teacher.network

    def restore(
        self, *, network: Callable[[Teacher], Any], initial_student: Callable[[], Any]
    ) -> Any:
        """The network's parameters."""
        del initial_student
        return network(self.teacher)


class _Several(AbstractTeacher):
    """Networks that are all in memory, over the entries that all have."""

    teachers: tuple[Teacher, ...]

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Those of all models."""
        return tuple(teacher.model.vocab_size for teacher in self.teachers)

    def networks(self, student: LanguageModel) -> tuple[LanguageModel, ...]:
        """All models, as they run beside the student."""
        common = min(student.vocab_size, *self.vocab_sizes)
        return tuple(narrowed(teacher.network, common) for teacher in self.teachers)

    def restore(
        self, *, network: Callable[[Teacher], Any], initial_student: Callable[[], Any]
    ) -> Any:
        """The parameters of each network, in their order."""
        del initial_student
        return tuple(network(teacher) for teacher in self.teachers)


@dataclasses.dataclass(frozen=True)
class TeacherMixture(_Several):
    """Several frozen networks that teach together: sum_i w_i P_i(. | x, y_<n) at every token.

    Each is restored in its own compute dtype. The objective's teacher temperature is that of the
    mixed distribution. All of them are in memory at once.

    Attributes:
      teachers: the networks, over one vocabulary.
      weights: w_i, positive; divided by their sum. None weighs all alike.

    Raises:
      ValueError: there are no teachers, one is no `Teacher`, or the weights are not positive or
        not as many.
    """

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", _checked_teachers(type(self), self.teachers))
        weights = self.weights
        if weights is None:
            weights = (1.0,) * len(self.teachers)
        object.__setattr__(self, "weights", tuple(weights))
        if len(self.shares) != len(self.teachers) or not all(
            _is_number(weight) and 0 < weight < math.inf for weight in self.shares
        ):
            raise ValueError(
                f"TeacherMixture.weights must be {len(self.teachers)} positive numbers, one a "
                f"teacher; got {self.weights}. Leave out a teacher that is to have no weight."
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, as given."""
        assert self.weights is not None
        return self.weights

    def source(self, start: str) -> str:
        """Each checkpoint with its share."""
        total = sum(self.shares)
        return " + ".join(
            f"{weight / total:.3g} x {teacher.source(start)}"
            for weight, teacher in zip(self.shares, self.teachers, strict=True)
        )

    def model_for(self, student: LanguageModel) -> LanguageModel:
        """The mixture of all models, over the entries that all have."""
        return MixtureModel(self.networks(student), self.shares)


@dataclasses.dataclass(frozen=True)
class RoutedTeachers(_Several):
    """Several frozen networks, each of which teaches its own sources of the data's mixture.

    The training's and the evaluation's data are a `data.mixtures.Mixture`. All networks are in
    memory, and all of them run on every batch, whose rows may belong to any.

    Attributes:
      teachers: the networks, over one vocabulary.
      routes: for each of the mixture's sources, in order, the number of its teacher; None where
        there are as many sources as teachers.

    Raises:
      ValueError: there are no teachers, one is no `Teacher`, or a route leads to none.
    """

    teachers: tuple[Teacher, ...]
    routes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", _checked_teachers(type(self), self.teachers))
        count = len(self.teachers)
        routes = tuple(range(count)) if self.routes is None else tuple(self.routes)
        object.__setattr__(self, "routes", routes)
        if set(routes) != set(range(count)):
            raise ValueError(
                f"RoutedTeachers.routes must name teachers from 0 to {count - 1}, each at least "
                f"once; got {routes}. Give the number of its teacher for each source of the "
                "mixture, and leave out a teacher that has none."
            )

    @property
    def num_sources(self) -> int:
        """The length of `routes`."""
        assert self.routes is not None
        return len(self.routes)

    def source(self, start: str) -> str:
        """Each checkpoint with the sources that it teaches."""
        assert self.routes is not None
        parts = []
        for number, teacher in enumerate(self.teachers):
            own = [str(source) for source, route in enumerate(self.routes) if route == number]
            parts.append(f"{teacher.source(start)} (of source {', '.join(own)})")
        return "; ".join(parts)

    def model_for(self, student: LanguageModel) -> LanguageModel:
        """All models, over the entries that all have, and which of them each row has."""
        assert self.routes is not None
        return RoutedModel(self.networks(student), self.routes)


class SelfTeacher(AbstractTeacher):
    """A teacher that is the student, at some time of the run: it shares the student's model."""

    def model_for(self, student: LanguageModel) -> LanguageModel:
        """The student's."""
        return student


@dataclasses.dataclass(frozen=True)
class InitialStudent(SelfTeacher):
    """The student as it was before training, frozen, in its compute dtype.

    Its parameters are made again at every start: read from `Student.initial_checkpoint`, or drawn
    from the run's seed where there is none. Nothing of it is saved, so the checkpoint must stay as
    it is: name one `checkpoint_<step>` of a run that goes on. Of a student with adapters
    (`LoRA`) it is the base, adapters off, in the arrays that the student has: no second copy.

    Without dropout, at equal temperatures, the gradient of the first step is 0. It keeps a
    student near to where it started, beside another loss or at another temperature.
    """

    def source(self, start: str) -> str:
        """What the student starts from."""
        return f"{start}, as the student starts"

    def model_for(self, student: LanguageModel) -> LanguageModel:
        """The student's, without adapters."""
        return base_of(student)

    def restore(
        self, *, network: Callable[[Teacher], Any], initial_student: Callable[[], Any]
    ) -> Any:
        """What the student starts with."""
        del network
        return initial_student()


class _InState(SelfTeacher):
    """A self-teacher that the training state holds: nothing is restored beside it."""

    def restore(
        self, *, network: Callable[[Teacher], Any], initial_student: Callable[[], Any]
    ) -> Any:
        """Nothing."""
        del network, initial_student


@dataclasses.dataclass(frozen=True)
class AverageStudent(_InState):
    """The exponential moving average of the student: a_n = d a_(n-1) + (1 - d) theta_n.

    It starts as the initial student, follows every update, and is kept in the state and in its
    checkpoints: float32, as large as the student. Mean teachers: arXiv 1703.01780; language
    models that teach themselves by their average: SDFT, arXiv 2601.19897.

    Attributes:
      decay: d, above 0 and below 1; the average reaches back about 1 / (1 - d) updates.

    Raises:
      ValueError: the decay is out of its range.
    """

    decay: float

    def __post_init__(self) -> None:
        if not (_is_number(self.decay) and 0.0 < self.decay < 1.0):
            raise ValueError(
                f"AverageStudent.decay must be above 0 and below 1; got {self.decay!r}. Set it to "
                "e.g. 0.999; of the student itself use LiveStudent, of the frozen one "
                "InitialStudent."
            )

    def source(self, start: str) -> str:
        """In words, with the decay."""
        del start
        return f"the student's average of decay {self.decay}"

    @property
    def state_part(self) -> str:
        """The average."""
        return "average"

    @property
    def average_decay(self) -> float:
        """The decay."""
        return self.decay


@dataclasses.dataclass(frozen=True)
class LiveStudent(_InState):
    """The student itself at every step, without dropout and without gradient.

    Where teacher and student see and do the same, a divergence of the two has no gradient: it
    teaches where they differ. With dropout in the student, that is the dropout; with a
    teacher temperature below the student's, the student sharpens its own answers.
    """

    def source(self, start: str) -> str:
        """In words."""
        del start
        return "the student itself at every step"

    @property
    def state_part(self) -> str:
        """The student's parameters."""
        return "params"


@dataclasses.dataclass(frozen=True)
class StoredTeacher(AbstractTeacher):
    """What a teacher said of the data's outputs, written by `--run_mode=store_teacher`.

    No network is in memory or run. It knows those outputs only, so it teaches on the data's outputs
    alone: `OutputMix.student_data_fraction` is 0.

    Attributes:
      path: the store of the training data.
      evaluation_path: a store of the evaluation's data; None leaves the divergence out of
        evaluations.
    """

    path: str
    evaluation_path: str | None = None

    def source(self, start: str) -> str:
        """The folder."""
        del start
        return self.path

    def model_for(self, student: LanguageModel) -> None:
        """There is none."""
        del student

    def restore(
        self, *, network: Callable[[Teacher], Any], initial_student: Callable[[], Any]
    ) -> Any:
        """Nothing."""
        del network, initial_student

    def store_for(self, data: str) -> str | None:
        """The two paths."""
        return {"train_data": self.path, "eval_data": self.evaluation_path}[data]


def _checked_teachers(owner: type, teachers: Iterable[object]) -> tuple[Teacher, ...]:
    """Networks as a tuple: a list, as gin gives it, could not be hashed."""
    checked = []
    for teacher in teachers:
        if not isinstance(teacher, Teacher):
            raise ValueError(
                f"{owner.__name__}.teachers must each be a Teacher; got {teacher!r}. Give its "
                "model and checkpoint as a Teacher; a teacher made from the student itself, or one "
                "with another vocabulary, cannot be one of several."
            )
        checked.append(teacher)
    if not checked:
        raise ValueError(f"{owner.__name__}.teachers is empty. Give at least one Teacher.")
    return tuple(checked)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
