"""Parses gin files and flags into plain bindings with gin's parser, and collects all problems."""

import dataclasses
import io
import pathlib
import tokenize
import types
from collections.abc import Callable, Sequence
from typing import Any

from gin import config_parser

from gkd_jax.common import moved
from gkd_jax.experiment.gin_files import names
from gkd_jax.experiment.gin_files.statements import (
    COMMAND_LINE,
    MACRO,
    REQUIRED,
    Binding,
    GinError,
    Key,
    Location,
    Reference,
    Target,
    did_you_mean,
    references,
)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A text that is parsed.

    Attributes:
      file: name of the text in messages.
      path: path of the file, or None for a flag. Included files are searched in its folder first.
      namespace: modules that the text may use.
      resolve: function that returns the class or function that a selector names.
    """

    file: str
    path: pathlib.Path | None
    namespace: names.Namespace
    resolve: Callable[[str], Target]


class GinParser:
    """Parses files and flags in order.

    Attributes:
      search_paths: folders in which files are searched.
      bindings: all bindings, in order.
      problems: one message for each problem, with its file and line.
    """

    def __init__(self, search_paths: Sequence[str]):
        self.search_paths = tuple(search_paths)
        self.bindings: list[Binding] = []
        self.problems: list[str] = []
        self._modules: dict[str, types.ModuleType] = {}
        self._targets: set[Target] = set()
        self._open_files: list[pathlib.Path] = []

    def parse_file(self, name: str, including_file: pathlib.Path | None = None) -> None:
        """Finds a file on the search paths, and parses it and the files that it includes.

        Raises:
          FileNotFoundError: no folder contains the file; the message lists the folders.
        """
        path = self._find(name, including_file)
        if path.resolve() in self._open_files:
            raise GinError(f"{path} includes itself. Remove one of the `include` lines.")
        self._open_files.append(path.resolve())
        self.parse_text(path.read_text(), file=str(path), path=path)
        self._open_files.pop()

    def _find(self, name: str, including_file: pathlib.Path | None) -> pathlib.Path:
        folders = [including_file.parent] if including_file else []
        folders += [pathlib.Path(path) for path in self.search_paths]
        candidates = dict.fromkeys((folder / name).absolute() for folder in folders)
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        for candidate in candidates:
            present = moved.present_gin_file(str(candidate))
            if present is not None and (path := pathlib.Path(present)).is_file():
                names.warn_once(f"{name} is now {pathlib.Path(name).with_name(path.name)}.")
                return path
        beside = {
            file.stem: str(pathlib.Path(name).parent / file.name)
            for folder in folders
            for file in (folder / name).parent.glob("*.gin")
        }
        hint = did_you_mean(pathlib.Path(name).stem, beside, shown=beside)
        raise FileNotFoundError(
            f"there is no gin file '{name}'.{hint} Searched:\n"
            + "\n".join(f"  {candidate}" for candidate in candidates)
            + "\nGive --gin_file a path, or its folder by --gin_search_paths."
        )

    def parse_text(self, text: str, *, file: str, path: pathlib.Path | None = None) -> None:
        """Parses the statements of one file."""
        namespace = names.Namespace()
        self._parse(text, _Source(file, path, namespace, namespace.resolve))
        for name, module in namespace.modules.items():
            self._modules.setdefault(name, module)

    def parse_flag(self, text: str) -> None:
        """Parses one binding of the command line, which may use the imports of all files."""
        namespace = names.Namespace()
        namespace.modules = self._modules
        namespace.is_dynamic = True

        def resolve(selector: str) -> Target:
            known = names.find_known(selector, self._targets)
            if known is None and "." not in selector:
                near = did_you_mean(selector, (target.name for target in self._targets))
                raise GinError(f"no gin file uses a class or function '{selector}'.{near}")
            return known or namespace.resolve(selector)

        self._parse(text, _Source(COMMAND_LINE, None, namespace, resolve))

    def _parse(self, text: str, source: _Source) -> None:
        """Parses the statements of a text, and reports every wrong one, not only the first."""

        def note(line: int, problem: object) -> None:
            where = f"{source.file}:{line}"
            if source.file == COMMAND_LINE:
                where = f"{source.file} `{text}`"
            # A wrong name in a block's header fails for each line of the block: report it once.
            if not (self.problems and self.problems[-1].endswith(f": {problem}")):
                self.problems.append(f"{where}: {problem}")

        parser = None
        try:
            parser = _StatementParser(io.StringIO(text), _Delegate(source.resolve))
            while True:
                try:
                    statement = parser.parse_statement()
                except GinError as error:
                    # gin appends the place to the message.
                    note(parser.line, str(error).partition("\n  In bindings string")[0])
                    parser.skip_statement()
                    continue
                if statement is None:
                    return
                try:
                    self._execute(statement, source)
                except (GinError, FileNotFoundError) as error:
                    note(statement.location.line_num, error)
        except (SyntaxError, tokenize.TokenError) as error:
            note(parser.line if parser else 1, _syntax_problem(error, text, source.file))

    def _execute(self, statement: Any, source: _Source) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            if statement.module == "__gin__.dynamic_registration":
                source.namespace.is_dynamic = True
            elif not source.namespace.is_dynamic:
                raise GinError(
                    "the first import must be `from __gin__ import dynamic_registration`. Add it."
                )
            else:
                source.namespace.add_import(statement)
        elif isinstance(statement, config_parser.IncludeStatement):
            self.parse_file(statement.filename, source.path)
        elif isinstance(statement, config_parser.BlockDeclaration):
            source.resolve(statement.selector)
        else:
            self._bind(statement, source)

    def _bind(self, statement: config_parser.BindingStatement, source: _Source) -> None:
        scope = names.present_scope(statement.scope)
        if not statement.arg_name:
            key = Key((*scope, names.present_macro(statement.selector)), MACRO, "value")
        else:
            target = source.resolve(statement.selector)
            parameters = target.parameters()
            name = names.present_parameter(target, statement.arg_name)
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            if name not in parameters and not takes_any:
                raise GinError(
                    f"{target} has no parameter '{name}'.{did_you_mean(name, parameters)} "
                    f"It has{': ' if parameters else ' '}{', '.join(parameters) or 'none'}."
                )
            key = Key(scope, target, name)
            self._targets.add(target)
        self._targets.update(reference.target for reference in references(statement.value))
        location = Location(source.file, statement.location.line_num)
        self.bindings.append(Binding(key, statement.value, location))


class _Delegate(config_parser.ParserDelegate):
    """Creates the values that gin's parser leaves to a delegate: references and macros."""

    def __init__(self, resolve: Callable[[str], Target]):
        self._resolve = resolve

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        target = self._resolve(selector)
        if not evaluate and dataclasses.is_dataclass(target.function):
            raise GinError(
                f"@{scoped_configurable_name} refers to a class where an object is wanted. Write "
                f"@{scoped_configurable_name}() with parentheses."
            )
        return Reference(names.present_scope(scope), target, evaluate)

    def macro(self, macro_name: str) -> Any:
        if macro_name in ("gin.REQUIRED", "REQUIRED"):
            return REQUIRED
        return Reference(names.present_scope(macro_name), MACRO, evaluate=True)


class _StatementParser(config_parser.ConfigParser):
    """gin's parser, extended so that a statement with an unknown name can be skipped."""

    @property
    def line(self) -> int:
        """Line of the current token, from 1."""
        return self._current_token.start[0] if self._current_token else 1

    def skip_statement(self) -> None:
        """Advances to the start of the next statement."""
        while self._current_token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
            self._advance_one_token()
        if self._current_token.type == tokenize.NEWLINE:
            self._advance_one_token()


def _syntax_problem(error: Exception, text: str, file: str) -> str:
    """Describes an error of gin's parser and its remedy."""
    if file == COMMAND_LINE:
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
