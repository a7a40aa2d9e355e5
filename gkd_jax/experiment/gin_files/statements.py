"""Data types of parsed gin statements, and the errors of gin files."""

import dataclasses
import difflib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# `Location.file` of a binding that was given by a flag.
COMMAND_LINE = "command line"


class GinError(ValueError):
    """Error of a wrong gin file or binding. The message lists every problem that was found."""


class MissingValues(GinError):
    """Required values were not given.

    Attributes:
      names: the missing values, as `NAME` in `--gin.NAME=value`.
    """

    def __init__(self, message: str, names: tuple[str, ...]):
        super().__init__(message)
        self.names = names


@dataclasses.dataclass(frozen=True)
class Location:
    """File and line of a statement, for messages."""

    file: str
    line: int

    def __str__(self) -> str:
        return self.file if self.file == COMMAND_LINE else f"{self.file}:{self.line}"


@functools.cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


@dataclasses.dataclass(frozen=True)
class Target:
    """A configurable class or function. Targets of the same function are equal.

    Attributes:
      module: full name of the module from which a saved configuration imports the target.
      name: name of the target in that module.
      function: the class or function.
      written: name of the target in the gin file, for messages; empty if no file mentions it, as
        for a default.
    """

    module: str
    name: str
    function: Callable[..., Any]
    written: str = ""

    def __str__(self) -> str:
        if self.written:
            return self.written
        return f"{self.module.rpartition('.')[2]}.{self.name}" if self.module else self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Returns the parameters that can be bound, by name."""
        return _parameters(self.function)


def _macro(value: Any) -> Any:
    return value


# gin implements the macro NAME as a call of this target in the scope NAME.
MACRO = Target(module="", name="macro", function=_macro)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference `@scope/target`, or `@scope/target()` if `evaluate`.

    `%NAME` is a reference to `MACRO` in the scope NAME, with `evaluate` set.
    """

    scope: tuple[str, ...]
    target: Target
    evaluate: bool


class _Required:
    """Type of the value of `%gin.REQUIRED`."""


REQUIRED = _Required()


@dataclasses.dataclass(frozen=True)
class Key:
    """Left side of a binding.

    The key of a macro NAME is the parameter `value` of `MACRO` in the scope NAME.
    """

    scope: tuple[str, ...]
    target: Target
    parameter: str

    def __str__(self) -> str:
        scope = "/".join(self.scope)
        if self.target == MACRO:
            return scope
        return f"{scope}{'/' if scope else ''}{self.target}.{self.parameter}"


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """One statement `key = value`."""

    key: Key
    value: Any
    location: Location


Bindings = dict[Key, Binding]


def did_you_mean(
    name: str, candidates: Iterable[str], shown: Mapping[str, str] | None = None
) -> str:
    """Returns a sentence with the candidate nearest to `name`, or '' if none is near.

    If `shown` is given, the sentence has `shown[candidate]` in place of the candidate.
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if not close:
        return ""
    nearest = by_lower[close[0]]
    return f" Did you mean '{shown[nearest] if shown else nearest}'?"


def references(value: Any) -> Iterator[Reference]:
    """Yields the references within a value."""
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(references, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(references, value))
