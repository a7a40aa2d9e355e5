"""Sources of a teacher's parameters: restored networks, or the student at some time of the run.

A teacher names its sources (`AbstractTeacher.parameter_sources`), which determine two trees:

* `teacher_params`: the parameters of the sources that are restored once, before training. Every
  jitted function takes them as an argument.
* `teaching_params`: the parameters of the teacher's model at a given step. `resolve` computes them
  within the jitted step from `teacher_params`, the training state and the student's frozen
  parameters.

Both trees have the same structure. If a teacher has one source, each of the two is the tree of that
source. If it has several sources, each is a tuple with one tree per source, in order. In
`teacher_params`, sources that are not restored have None in place of a tree.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from gkd_jax.common.array_types import Params
from gkd_jax.distillation.train_state import TrainState
from gkd_jax.models import lora

Sources = tuple["ParameterSource", ...]


class ParameterSource(abc.ABC):
    """One source of a teacher's parameters. Hashable, so that it can be a static argument.

    Attributes:
      state_field: name of the field of `TrainState` that the source reads; None if it reads none.
    """

    state_field: ClassVar[str | None] = None

    @abc.abstractmethod
    def resolve(
        self, state: TrainState | None, restored: Params | None, frozen: Params | None
    ) -> Params | None:
        """Returns this source's parameters at a training state.

        Args:
          state: state before the update; only read by a source with a `state_field`.
          restored: parameters that were restored for this source; None if it is not restored.
          frozen: frozen parameters of the student; None if all are trained.
        """


@dataclasses.dataclass(frozen=True)
class Restored(ParameterSource):
    """The teacher's own networks, restored from their checkpoints."""

    def resolve(
        self, state: TrainState | None, restored: Params | None, frozen: Params | None
    ) -> Params | None:
        del state, frozen
        return restored


@dataclasses.dataclass(frozen=True)
class Initial(ParameterSource):
    """The student before training, restored or initialized again at every start of the run."""

    def resolve(
        self, state: TrainState | None, restored: Params | None, frozen: Params | None
    ) -> Params | None:
        del state, frozen
        return restored


@dataclasses.dataclass(frozen=True)
class FrozenBase(ParameterSource):
    """The frozen base of a student with adapters: the student's own arrays, not a copy."""

    def resolve(
        self, state: TrainState | None, restored: Params | None, frozen: Params | None
    ) -> Params | None:
        del state, restored
        return frozen


class _InState(ParameterSource):
    """A field of the training state, joined with the student's frozen parameters."""

    def resolve(
        self, state: TrainState | None, restored: Params | None, frozen: Params | None
    ) -> Params | None:
        del restored
        assert self.state_field is not None
        return lora.join(getattr(state, self.state_field), frozen)


@dataclasses.dataclass(frozen=True)
class Average(_InState):
    """The moving average of the student, kept in the training state.

    Attributes:
      decay: decay of the average per update, in (0, 1).
    """

    state_field: ClassVar[str | None] = "average"
    decay: float


@dataclasses.dataclass(frozen=True)
class Live(_InState):
    """The student's parameters before the update."""

    state_field: ClassVar[str | None] = "params"


ALL_RESTORED: Sources = (Restored(),)
"""Sources of a teacher that is restored as a whole: its `teaching_params` are `teacher_params`."""


def join_sources(trees: Sequence[Params | None]) -> Params | None:
    """Joins one tree per source into the structure of `teacher_params` and `teaching_params`.

    Returns:
      None if there is no tree at all; the tree of a single source; otherwise a tuple.
    """
    if all(tree is None for tree in trees):
        return None
    return trees[0] if len(trees) == 1 else tuple(trees)


def resolve(
    sources: Sources,
    state: TrainState | None,
    teacher_params: Params | None,
    frozen: Params | None = None,
) -> Params | None:
    """Returns the `teaching_params`: the parameters of the teacher's model at a training state.

    A pure function to be called within the jitted step, so that sources that are read from the
    training state take no extra memory.

    Args:
      sources: the teacher's sources; empty if there is no teacher, or if its distributions are
        precomputed.
      state: state before the update; None if no source has a `state_field`.
      teacher_params: parameters restored before training, as returned by `AbstractTeacher.restore`.
      frozen: frozen parameters of the student; None if all are trained.

    Returns:
      The tree of a single source, or a tuple of trees for several sources; None if no source has
      parameters.
    """
    if len(sources) == 1:
        restored: Sequence[Params | None] = (teacher_params,)
    else:
        restored = (None,) * len(sources) if teacher_params is None else teacher_params
    trees = [
        source.resolve(state, tree, frozen) for source, tree in zip(sources, restored, strict=True)
    ]
    return join_sources(trees)


def state_fields(sources: Sources) -> tuple[str, ...]:
    """Returns the names of the fields of `TrainState` that the sources read, without repetition."""
    fields = (source.state_field for source in sources)
    return tuple(dict.fromkeys(field for field in fields if field is not None))


def average_decay(sources: Sources) -> float | None:
    """Returns the decay of the average that the sources read; None if they read no average.

    Raises:
      ValueError: two sources are averages with different decays.
    """
    decays = {source.decay for source in sources if isinstance(source, Average)}
    if len(decays) > 1:
        raise ValueError(
            "the training state keeps one average of the student; got sources with decays "
            f"{sorted(decays)}. Give all of them the same decay."
        )
    return next(iter(decays), None)
