"""Teachers that consist of one or several frozen networks, restored from checkpoints."""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable

from gkd_jax.common.array_types import Params
from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.distillation import parameter_sources
from gkd_jax.distillation.parameter_sources import ALL_RESTORED, Initial, Restored, Sources
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.ensembles import MixtureModel, RoutedModel
from gkd_jax.models.quantised import Int8
from gkd_jax.models.wrapper import restrict_vocabulary


class AbstractTeacher(abc.ABC):
    """Interface of all teachers.

    A teacher runs without dropout and gets no gradient. Subclasses are frozen dataclasses that
    define `describe` and `model_for`. A subclass whose parameters do not come from restored
    networks also defines `parameter_sources`.
    """

    @abc.abstractmethod
    def describe(self, start: str) -> str:
        """Returns a text for plans, logs and files: where the teacher's parameters come from.

        Args:
          start: description of the student's initial parameters.
        """

    @property
    def networks(self) -> tuple["Teacher", ...]:
        """Networks that are restored from checkpoints of their own; empty for self-teachers."""
        return ()

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Output layer sizes of the networks that share the student's vocabulary."""
        return ()

    @abc.abstractmethod
    def model_for(self, student: LanguageModel) -> LanguageModel | None:
        """Returns the model that computes the teacher's logits.

        The model is restricted to the vocabulary entries that it shares with `student`. Returns
        None if the teacher's distributions are precomputed.
        """

    def parameter_sources(self, student: LanguageModel) -> Sources:
        """Returns the sources of the parameters of `model_for(student)`.

        With several sources, the model takes a tuple with one parameter tree per source.
        """
        del student
        return ALL_RESTORED

    def restore(
        self,
        student: LanguageModel,
        *,
        network: Callable[["Teacher"], Params],
        initial_student: Callable[[], Params],
    ) -> Params | None:
        """Restores the parameters of those sources that have to be loaded before training.

        `network` and `initial_student` may return trees of shapes or shardings instead of arrays.

        Args:
          student: the model that is trained.
          network: function that loads the parameters of one network.
          initial_student: function that loads the parameters that the student starts with.

        Returns:
          The `teacher_params` described in the module `distillation.parameter_sources`: a tree
          for a single source, otherwise a tuple with one tree per source. Sources that are not
          restored have None in place of a tree.
        """
        trees = []
        for source in self.parameter_sources(student):
            if isinstance(source, Restored):
                trees.append(self.restore_networks(network))
            else:
                trees.append(initial_student() if isinstance(source, Initial) else None)
        return parameter_sources.join_sources(trees)

    def restore_networks(self, network: Callable[["Teacher"], Params]) -> Params:
        """Loads the parameters of `networks`, in the structure that the teacher's model takes."""
        return tuple(network(teacher) for teacher in self.networks)

    @property
    def own_tokens(self) -> "CrossTokenizerTeacher | None":
        """The teacher itself if it has its own tokenizer; None if it uses the student's tokens."""
        return None

    @property
    def num_sources(self) -> int | None:
        """Number of data sources if the source of a row selects its teacher, otherwise None."""
        return None

    def store_for(self, data: str) -> str | None:
        """Returns the folder of precomputed distributions; None for a teacher with a model.

        Args:
          data: 'train_data' or 'eval_data'.
        """
        del data
        return None


@dataclasses.dataclass(frozen=True)
class Teacher(AbstractTeacher):
    """One frozen network.

    It is restored in its compute dtype, has no optimizer state and is never saved.

    Attributes:
      model: the teacher's model. If its output layer is padded to another size than the student's
        output layer, the two models are compared over the entries that both have.
      checkpoint: a checkpoint of gkd_jax (a run's directory or one step of it) or of T5X.
      vocabulary: the teacher's vocabulary, which is checked against the student's, entry by entry.
        If it is None and the checkpoint records no vocabulary, the two vocabularies are assumed to
        be the same, provided that the output layers have the same size.
      weights: 'int8' keeps the weights of matrix products in int8 (`models.quantised`), which takes
        half the memory of bfloat16. None keeps all weights in the compute dtype.

    Raises:
      ValueError: `weights` is neither None nor 'int8'.
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
        """The model that computes the logits: `model`, quantized if `weights` is 'int8'."""
        return self.model if self.weights is None else Int8(self.model)

    @property
    def networks(self) -> tuple["Teacher", ...]:
        return (self,)

    def describe(self, start: str) -> str:
        del start
        return self.checkpoint + ("" if self.weights is None else f" in {self.weights}")

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        return (self.model.vocab_size,)

    def model_for(self, student: LanguageModel) -> LanguageModel:
        return restrict_vocabulary(self.network, student.vocab_size)

    def restore_networks(self, network: Callable[["Teacher"], Params]) -> Params:
        return network(self)


@dataclasses.dataclass(frozen=True)
class CrossTokenizerTeacher(AbstractTeacher):
    """One frozen network whose tokenizer is not the student's. It reads the text in its own tokens.

    The divergence compares spans of equal text (`objectives.spans`).

    Attributes:
      teacher: the network; its `vocabulary` must be set.
      inputs_length: longest prompt, in the teacher's tokens; None for the student's limit.
      targets_length: longest output, in the teacher's tokens; None for the student's limit. Spans
        beyond it do not enter the loss.
      inputs_eos: whether prompts end with the end-of-sequence token; None uses the student's
        setting.
      inputs_bos: whether prompts begin with the beginning-of-sequence token.

    Raises:
      ValueError: `teacher` is not a `Teacher` or has no vocabulary, or a length is below 2.
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
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        """The network's vocabulary."""
        assert self.teacher.vocabulary is not None
        return self.teacher.vocabulary

    @property
    def networks(self) -> tuple[Teacher, ...]:
        return (self.teacher,)

    def describe(self, start: str) -> str:
        return f"{self.teacher.describe(start)}, which reads {self.vocabulary.name}"

    def model_for(self, student: LanguageModel) -> LanguageModel:
        del student
        return self.teacher.network

    def restore_networks(self, network: Callable[[Teacher], Params]) -> Params:
        return network(self.teacher)


class _Ensemble(AbstractTeacher):
    """Several networks, all in memory, restricted to the vocabulary entries that they share."""

    teachers: tuple[Teacher, ...]

    @property
    def networks(self) -> tuple[Teacher, ...]:
        return self.teachers

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        return tuple(teacher.model.vocab_size for teacher in self.teachers)

    def restricted_models(self, student: LanguageModel) -> tuple[LanguageModel, ...]:
        """Returns all models, restricted to the entries that all of them and the student have."""
        common = min(student.vocab_size, *self.vocab_sizes)
        return tuple(restrict_vocabulary(teacher.network, common) for teacher in self.teachers)


@dataclasses.dataclass(frozen=True)
class TeacherMixture(_Ensemble):
    """A weighted mixture of the distributions of several frozen networks.

    The probability of the next token is

      P(. | x, y_<n) = sum_i w_i P_i(. | x, y_<n).

    Each network is restored in its own compute dtype. The objective's teacher temperature is
    applied to the mixture. All networks are in memory at once.

    Attributes:
      teachers: the networks, which have the same vocabulary.
      weights: w_i, positive; they are normalized to sum to 1. None gives equal weights.

    Raises:
      ValueError: `teachers` is empty or holds anything but a `Teacher`, or `weights` does not hold
        one positive number per teacher.
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
        """The weights before normalization."""
        assert self.weights is not None
        return self.weights

    def describe(self, start: str) -> str:
        total = sum(self.shares)
        return " + ".join(
            f"{weight / total:.3g} x {teacher.describe(start)}"
            for weight, teacher in zip(self.shares, self.teachers, strict=True)
        )

    def model_for(self, student: LanguageModel) -> LanguageModel:
        return MixtureModel(self.restricted_models(student), self.shares)


@dataclasses.dataclass(frozen=True)
class RoutedTeachers(_Ensemble):
    """Several frozen networks, each of which teaches some sources of the data's mixture.

    Training and evaluation data must be a `data.mixtures.Mixture`. All networks are in memory, and
    all of them run on every batch, since the rows of a batch may come from any source.

    Attributes:
      teachers: the networks, which have the same vocabulary.
      routes: index into `teachers` for each source of the mixture, in order. None routes source i
        to teacher i.

    Raises:
      ValueError: `teachers` is empty or holds anything but a `Teacher`, or `routes` does not name
        each teacher at least once.
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
        """Number of sources of the mixture: the length of `routes`."""
        assert self.routes is not None
        return len(self.routes)

    def describe(self, start: str) -> str:
        assert self.routes is not None
        lines = []
        for number, teacher in enumerate(self.teachers):
            own = [str(source) for source, route in enumerate(self.routes) if route == number]
            lines.append(f"{teacher.describe(start)} (of source {', '.join(own)})")
        return "; ".join(lines)

    def model_for(self, student: LanguageModel) -> LanguageModel:
        assert self.routes is not None
        return RoutedModel(self.restricted_models(student), self.routes)


def _checked_teachers(owner: type, teachers: Iterable[object]) -> tuple[Teacher, ...]:
    """Checks the networks and returns them as a tuple: the list that gin passes is not hashable."""
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
