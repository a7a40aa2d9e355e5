"""Reads gin files and flags, by gin's own parser, into plain bindings; notes what is misspelt."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import io
import itertools
import pathlib
import pkgutil
import sys
import tokenize
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from gin import config_parser

from gkd_jax.common import moved

_COMMAND_LINE = "command line"


class GinError(ValueError):
    """A gin file or binding is wrong; the message lists all that is."""


class MissingValues(GinError):
    """Required values were not given.

    Attributes:
      names: what to give, as `NAME` in `--gin.NAME=value`.
    """

    def __init__(self, message: str, names: tuple[str, ...]):
        super().__init__(message)
        self.names = names


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a statement stands, for messages."""

    file: str
    line: int

    def __str__(self) -> str:
        return self.file if self.file == _COMMAND_LINE else f"{self.file}:{self.line}"


@functools.cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


@dataclasses.dataclass(frozen=True)
class Target:
    """A configurable: a class or function, by the module and the name that gin finds it under."""

    module: str
    name: str
    function: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.name}" if self.module else self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What can be bound."""
        return _parameters(self.function)


def _macro(value: Any) -> Any:
    return value


MACRO = Target(module="", name="macro", function=_macro)


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/target`, called if `evaluate`; `%NAME` is a call of `MACRO` in the scope NAME."""

    scope: tuple[str, ...]
    target: Target
    evaluate: bool


class _Required:
    """The value of `%gin.REQUIRED`."""


REQUIRED = _Required()


@dataclasses.dataclass(frozen=True)
class Key:
    """What a statement binds. A macro NAME is the parameter `value` of `MACRO` in scope NAME."""

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


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Returns a sentence that names the candidate nearest to `name`, or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""


def references(value: Any) -> Iterator[Reference]:
    """Finds the references within a value."""
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(references, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(references, value))


class _Namespace:
    """The names that one gin file imported."""

    def __init__(self) -> None:
        self.modules: dict[str, types.ModuleType] = {}
        self.is_dynamic = False

    def add_import(self, statement: config_parser.ImportStatement) -> None:
        wanted = moved.present_module(statement.module)
        if wanted is None:
            wanted = statement.module
        else:
            warn_once(f"{statement.module} is now {wanted}. Import that in gin files.")
        try:
            module = importlib.import_module(wanted)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if not f"{wanted}.".startswith(f"{missing}."):
                raise GinError(
                    f"importing {wanted} failed: {error}. Install what it needs."
                ) from error
            raise GinError(
                f"there is no module '{wanted}'.{did_you_mean(wanted, _siblings(missing))} "
                "A module of your own must be importable: set PYTHONPATH to its folder."
            ) from error
        except (ImportError, SyntaxError) as error:
            raise GinError(f"importing {wanted} failed: {error}. Correct that module.") from error
        name = statement.bound_name()
        if statement.is_from or statement.alias:
            self.modules[name] = module
        else:
            self.modules[name] = importlib.import_module(name)

    def _module(self, name: str) -> types.ModuleType | None:
        """The module that a file imported under a name, or the one that used to have the name."""
        if name in self.modules:
            return self.modules[name]
        module = moved.gin_alias(name)
        if module is None or module.split(".")[1] not in self.modules:
            return None
        warn_once(f"'{name}.' is now '{module.split('.')[1]}.' in gin files.")
        return importlib.import_module(module)

    def resolve(self, selector: str) -> Target:
        """Finds the class or function that `selector` names."""
        first, *rest = selector.split(".")
        value: Any = self._module(first)
        if value is None:
            near = did_you_mean(first, self.modules)
            raise GinError(
                f"'{first}' (in '{selector}') is not imported in this file."
                + (near or f" Import its module, e.g. `from gkd_jax import {first}`.")
            )
        for name in rest:
            if not isinstance(value, types.ModuleType):
                raise GinError(
                    f"'{selector}' is not the name of a class or function: only those of a module "
                    "can be configured."
                )
            renamed = moved.present_name(value.__name__, name)
            if renamed is not None:
                home, present = renamed
                warn_once(
                    f"{value.__name__}.{name} is now {home}.{present}. Use that in gin files."
                )
                value, name = importlib.import_module(home), present
            if not hasattr(value, name):
                raise GinError(
                    f"{value.__name__} has no '{name}'.{did_you_mean(name, _public_names(value))}"
                )
            module, value = value, getattr(value, name)
        if not callable(value):
            raise GinError(
                f"'{selector}' is not the name of a class or function. A parameter is bound as "
                "`module.Class.parameter = value`, a macro has no dot in its name."
            )
        return canonical_target(module.__name__, name, value)


def _public_names(module: types.ModuleType) -> set[str]:
    """Names that a module defines or, if it is a room, re-exports lazily."""
    exported = getattr(module, "_EXPORTS", {}).values()
    return {name for name in vars(module) if name[0] != "_"}.union(*exported)


def canonical_target(module: str, name: str, function: Callable[..., Any]) -> Target:
    """Prefers the package that re-exports an object, then the module that defines it."""
    home = getattr(function, "__module__", None) or module
    home_name = getattr(function, "__qualname__", name)
    is_public = not any(part.startswith("_") for part in home.split("."))
    if is_public and getattr(sys.modules.get(home), home_name, None) is function:
        package = home.rpartition(".")[0]
        is_exported = getattr(sys.modules.get(package), home_name, None) is function
        return Target(package if is_exported else home, home_name, function)
    return Target(module, name, function)


def names_of(target: Target) -> set[str]:
    """Every full name that a flag may call a target by: also that of before a move."""
    home = getattr(target.function, "__module__", None) or target.module
    names = {f"{module}.{target.name}" for module in (target.module, home)}
    return names.union(moved.former_names(home, target.name))


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning the first time that it is given."""
    logging.warning("%s", message)


def _siblings(missing: str) -> list[str]:
    """Full names of modules beside a missing one."""
    parent = missing.rpartition(".")[0]
    if not parent:
        return [module.name for module in pkgutil.iter_modules()]
    paths = importlib.import_module(parent).__path__
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(paths)]


class _Delegate(config_parser.ParserDelegate):
    def __init__(self, resolve: Callable[[str], Target]):
        self._resolve = resolve

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        *scope, selector = scoped_configurable_name.split("/")
        target = self._resolve(selector)
        if not evaluate and dataclasses.is_dataclass(target.function):
            raise GinError(
                f"@{scoped_configurable_name} refers to a class where an object is wanted. Write "
                f"@{scoped_configurable_name}() with parentheses."
            )
        return Reference(tuple(scope), target, evaluate)

    def macro(self, macro_name: str) -> Any:
        if macro_name in ("gin.REQUIRED", "REQUIRED"):
            return REQUIRED
        *scope, name = macro_name.split("/")
        return Reference((*scope, _present_macro(name)), MACRO, evaluate=True)


def _present_macro(name: str) -> str:
    """Returns the present name of a macro."""
    present = moved.present_macro(name)
    if present is None:
        return name
    warn_once(f"the macro {name} is now {present}. Use that in gin files and flags.")
    return present


def _present_parameter(target: Target, name: str) -> str:
    """Returns the present name of a parameter of `target`; other names are returned unchanged."""
    present = None if name in target.parameters() else moved.present_setting(target.function, name)
    if present is None:
        return name
    warn_once(f"{target}.{name} is now {target}.{present}. Use that in gin files.")
    return present


class Reader:
    """Reads files and flags in order.

    Attributes:
      bindings: all statements, in order.
      problems: one message for each thing that is wrong, with its place.
    """

    def __init__(self, search_paths: Sequence[str]):
        self.search_paths = tuple(search_paths)
        self.bindings: list[Binding] = []
        self.problems: list[str] = []
        self._modules: dict[str, types.ModuleType] = {}
        self._targets: set[Target] = set()
        self._open_files: list[pathlib.Path] = []

    def read_file(self, name: str, including_file: pathlib.Path | None = None) -> None:
        """Reads a file, found on the search paths, and what it includes.

        Raises:
          FileNotFoundError: it is nowhere; the message lists where it was looked for.
        """
        path = self._find(name, including_file)
        if path.resolve() in self._open_files:
            raise GinError(f"{path} includes itself. Remove one of the `include` lines.")
        self._open_files.append(path.resolve())
        self.read_text(path.read_text(), file=str(path), path=path)
        self._open_files.pop()

    def _find(self, name: str, including_file: pathlib.Path | None) -> pathlib.Path:
        folders = [including_file.parent] if including_file else []
        folders += [pathlib.Path(path) for path in self.search_paths]
        candidates = dict.fromkeys((folder / name).absolute() for folder in folders)
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        present = moved.present_gin_file(name)
        if present is not None:
            warn_once(f"{name} is now {present}.")
            return self._find(present, including_file)
        beside = {
            str(file.relative_to(folder)): None
            for folder in folders
            for file in (folder / name).parent.glob("*.gin")
        }
        raise FileNotFoundError(
            f"there is no gin file '{name}'.{did_you_mean(name, beside)} Searched:\n"
            + "\n".join(f"  {candidate}" for candidate in candidates)
            + "\nGive --gin_file a path, or its folder by --gin_search_paths."
        )

    def read_text(self, text: str, *, file: str, path: pathlib.Path | None = None) -> None:
        """Reads the statements of one file."""
        namespace = _Namespace()
        self._read_statements(text, file, path, namespace, namespace.resolve)
        for name, module in namespace.modules.items():
            self._modules.setdefault(name, module)

    def read_flag(self, text: str) -> None:
        """Reads one binding of the command line, which sees what all files imported."""
        namespace = _Namespace()
        namespace.modules = self._modules
        namespace.is_dynamic = True

        def resolve(selector: str) -> Target:
            dotted = f".{selector}"
            known = [
                target
                for target in self._targets
                if any(f".{name}".endswith(dotted) for name in names_of(target))
            ]
            if len(known) > 1:
                names = sorted(f"{t.module}.{t.name}" for t in known)
                raise GinError(f"'{selector}' may be any of {names}. Give more of its name.")
            return known[0] if known else namespace.resolve(selector)

        self._read_statements(text, _COMMAND_LINE, None, namespace, resolve)

    def _read_statements(
        self,
        text: str,
        file: str,
        path: pathlib.Path | None,
        namespace: _Namespace,
        resolve: Callable[[str], Target],
    ) -> None:
        def note(line: int, problem: object) -> None:
            where = f"{file} `{text}`" if file == _COMMAND_LINE else f"{file}:{line}"
            # A wrong name above a block is wrong for each line of it: say it once.
            if not (self.problems and self.problems[-1].endswith(f": {problem}")):
                self.problems.append(f"{where}: {problem}")

        parser = None
        try:
            parser = _Parser(io.StringIO(text), _Delegate(resolve))
            while True:
                try:
                    statement = parser.parse_statement()
                except GinError as error:
                    # Go on with the next statement, so as to report every wrong name.
                    # gin adds a place of its own to the message.
                    note(parser.line, str(error).partition("\n  In bindings string")[0])
                    parser.skip_statement()
                    continue
                if statement is None:
                    return
                try:
                    self._do(statement, file, path, namespace, resolve)
                except (GinError, FileNotFoundError) as error:
                    note(statement.location.line_num, error)
        except (SyntaxError, tokenize.TokenError) as error:
            note(parser.line if parser else 1, _syntax_problem(error, text, file))

    def _do(
        self,
        statement: Any,
        file: str,
        path: pathlib.Path | None,
        namespace: _Namespace,
        resolve: Callable[[str], Target],
    ) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            if statement.module == "__gin__.dynamic_registration":
                namespace.is_dynamic = True
            elif not namespace.is_dynamic:
                raise GinError(
                    "the first import must be `from __gin__ import dynamic_registration`. Add it."
                )
            else:
                namespace.add_import(statement)
        elif isinstance(statement, config_parser.IncludeStatement):
            self.read_file(statement.filename, path)
        elif isinstance(statement, config_parser.BlockDeclaration):
            resolve(statement.selector)
        else:
            self._bind(statement, resolve, Location(file, statement.location.line_num))

    def _bind(
        self,
        statement: config_parser.BindingStatement,
        resolve: Callable[[str], Target],
        location: Location,
    ) -> None:
        scope = tuple(statement.scope.split("/")) if statement.scope else ()
        if not statement.arg_name:
            key = Key((*scope, _present_macro(statement.selector)), MACRO, "value")
        else:
            target = resolve(statement.selector)
            parameters = target.parameters()
            name = _present_parameter(target, statement.arg_name)
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            if name not in parameters and not takes_any:
                raise GinError(
                    f"{target} has no parameter '{name}'.{did_you_mean(name, parameters)} "
                    f"It has: {', '.join(parameters)}."
                )
            key = Key(scope, target, name)
            self._targets.add(target)
        self._targets.update(reference.target for reference in references(statement.value))
        self.bindings.append(Binding(key, statement.value, location))


class _Parser(config_parser.ConfigParser):
    """gin's parser, able to go on after a value that names something unknown."""

    @property
    def line(self) -> int:
        return self._current_token.start[0] if self._current_token else 1

    def skip_statement(self) -> None:
        while self._current_token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
            self._advance_one_token()
        if self._current_token.type == tokenize.NEWLINE:
            self._advance_one_token()


def _syntax_problem(error: Exception, text: str, file: str) -> str:
    if file == _COMMAND_LINE:
        name, _, value = text.partition("=")
        return (
            f"the value is no gin value. Text needs quotes: --gin.{name.strip()}="
            f"'\"{value.strip()}\"'"
        )
    message = str(error.args[0]).strip().split("\n")[0]
    location: tuple[Any, ...] = error.args[1] if len(error.args) > 1 else ()
    if len(location) > 3 and location[3]:
        message += f" In the line: {location[3].strip()}"
    return f"{message} Text needs quotes; a value is a Python literal, @reference() or %MACRO."
