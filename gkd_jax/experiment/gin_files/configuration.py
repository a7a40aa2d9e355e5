"""Configurations from gin files, with T5X's conventions and strict checks.

A misspelt name, an unused binding and a missing value are errors here. gin itself accepts unused
bindings and unused macros. Therefore this package checks a configuration before gin evaluates it:

1. `parser` parses all statements.
2. `walk` finds, without building them, all objects that are needed to build the root, which is the
   `Experiment` or the `Study`.
3. `text` writes the checked configuration as one text with all defaults.

gin evaluates this text. The same text is saved, so that a saved configuration cannot differ from
the configuration that ran.
"""

import dataclasses
import difflib
import fnmatch
import pathlib
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import gin
from etils import epath

from gkd_jax.experiment.gin_files.names import canonical_target
from gkd_jax.experiment.gin_files.parser import GinParser
from gkd_jax.experiment.gin_files.statements import (
    MACRO,
    Binding,
    GinError,
    MissingValues,
    Target,
    did_you_mean,
)
from gkd_jax.experiment.gin_files.text import Setting, Text, list_settings, with_defaults
from gkd_jax.experiment.gin_files.walk import Walk, merge, unused_problem

_PACKAGE = pathlib.Path(__file__).parents[2]
# The folder gin_configs/ is beside the package in a checkout, and inside an installed package.
_PACKAGE_SEARCH_PATHS = (str(_PACKAGE.parent), str(_PACKAGE))
_CONFIG_FILE = "config.gin"


@dataclasses.dataclass(frozen=True)
class GinConfig:
    """A checked configuration.

    Attributes:
      text: self-contained gin file of the configuration, with all defaults written out.
      settings: every value of every object that is built.
      root: class or function that the configuration builds.
    """

    text: str
    settings: tuple[Setting, ...]
    root: Callable[..., Any]

    def build(self) -> Any:
        """Calls the root with everything that the configuration binds.

        Raises:
          GinError: a value is wrong; the message ends with the name of the object being built.
          OSError: a file that a value names cannot be read.
        """
        gin.clear_config()
        gin.parse_config(self.text)
        try:
            return gin.get_configurable(self.root)()
        except OSError as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(_readable(str(error))) from error
        except (ValueError, TypeError) as error:
            raise GinError(_readable(str(error))) from error


def _readable(message: str) -> str:
    """Replaces the nested calls that gin lists in an error message by the innermost one."""
    pattern = r"\n  In call to configurable '(\w+)' \(.*?\)(?: in scope '(.*?)')?(?=\n|$)"
    calls = re.findall(pattern, message)
    message = re.sub(pattern, "", message)
    if not calls:
        return message
    name, scope = calls[0]
    return f"{message} (in {scope + '/' if scope else ''}{name})"


def parse(
    *,
    roots: Sequence[Callable[..., Any]],
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> GinConfig:
    """Parses gin files, then bindings, and checks everything before anything is built.

    Later statements override earlier ones. Files are searched in `search_paths`, the current
    folder and the package's folder, in this order. Included files are first searched in the folder
    of the including file.

    Args:
      roots: classes such as `(Study, Experiment)`. The configuration builds the first of them that
        the files bind.
      gin_files: paths of gin files.
      bindings: bindings `NAME = value` or `scope/module.Class.parameter = value`.
      search_paths: folders in which gin files are searched.

    Returns:
      The checked configuration. Bindings that later bindings make unused are left out.

    Raises:
      GinError: a name is misspelt, a binding is unused, or an object is built from itself. The
        message lists every problem.
      MissingValues: required values are missing. The message lists all of them.
      FileNotFoundError: a gin file does not exist.
    """
    parser = GinParser((*search_paths, ".", *_PACKAGE_SEARCH_PATHS))
    for file in gin_files:
        parser.parse_file(file)
    for binding in bindings:
        parser.parse_flag(binding)
    _raise_problems(parser.problems)
    return _check(parser.bindings, roots)


def parse_text(text: str, *, roots: Sequence[Callable[..., Any]], name: str) -> GinConfig:
    """Parses and checks the text of a saved configuration, as `parse` does.

    `name` is the file name in messages.
    """
    parser = GinParser((".", *_PACKAGE_SEARCH_PATHS))
    parser.parse_text(text, file=name)
    _raise_problems(parser.problems)
    return _check(parser.bindings, roots)


def _raise_problems(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise GinError(problems[0])
    if problems:
        lines = "\n".join(f"  {i}. {text}" for i, text in enumerate(problems, start=1))
        raise GinError(f"{len(problems)} things are wrong:\n{lines}")


def _find_root(statements: Sequence[Binding], roots: Sequence[Callable[..., Any]]) -> Target:
    targets = [canonical_target(root.__module__, root.__qualname__, root) for root in roots]
    bound = {statement.key.target for statement in statements}
    for target in targets:
        if target in bound:
            return target
    raise GinError(
        f"no gin file binds {' or '.join(map(str, targets))}. Give --gin_file a file that does, "
        "e.g. gin_configs/quickstart.gin."
    )


def _check(statements: Sequence[Binding], roots: Sequence[Callable[..., Any]]) -> GinConfig:
    root = _find_root(statements, roots)
    merged, overridden = merge(statements, root)
    walk = Walk(merged, root)
    problems = [
        f"{origin.location}: %{name} is used by {origin.key} and has no value."
        f"{did_you_mean(name, (str(key) for key in merged if key.target == MACRO))}"
        f" Give it one by --gin.{name}=..."
        for name, origin in walk.undefined.items()
    ]
    problems += [f"{name} is built from itself. Change its value." for name in walk.cycles]
    problems += [
        unused_problem(binding, walk)
        for key, binding in merged.items()
        if key not in walk.used and binding not in overridden
    ]
    _raise_problems(problems)
    if walk.missing:
        lines = "".join(f"\n  --gin.{name}=...  ({why})" for name, why in walk.missing.items())
        raise MissingValues(
            "values are missing. Give them in a gin file or by flags (text within quotes of its "
            f"own: --gin.NAME='\"text\"'):{lines}",
            names=tuple(walk.missing),
        )
    walk = Walk(with_defaults(merged, root), root)
    return GinConfig(text=str(Text(walk)), settings=list_settings(walk, root), root=root.function)


# Settings that may differ from the saved configuration when a run is resumed, such as its folder,
# its length, and what is logged. Each is a pattern `Class.parameter`, in which * matches any text.
# A pattern includes all settings of the objects that are built for the parameter.
MAY_CHANGE = (
    "Experiment.model_dir",
    "Experiment.num_steps",
    "Experiment.partitioner",
    "Experiment.log_period",
    "Experiment.hang_seconds",
    "Experiment.profile_steps",
    "Experiment.topology",
    "Experiment.generation",
    "Evaluation.period",
    "Checkpoints.period",
    "Checkpoints.keep",
    "DatasetConfig.cache_bytes",
    "DatasetConfig.read_threads",
    "Alarms.*",
    "NonFinite.*",
    "Study.model_dir",
)


def check_config(
    model_dir: str, config: GinConfig, *, may_change: Sequence[str] = MAY_CHANGE
) -> None:
    """Checks that a run's folder is new or was written with the same configuration.

    Args:
      model_dir: the run's folder.
      config: the configuration that is to run.
      may_change: patterns `Class.parameter` of settings that may differ.

    Raises:
      GinError: settings differ; the message shows the difference.
    """
    path = epath.Path(model_dir) / _CONFIG_FILE
    try:
        text = path.read_text() if path.exists() else None
    except Exception as error:  # Bucket libraries have their own exception types.
        raise ValueError(
            f"Experiment.model_dir cannot be read: {path} ({error!r}). Set MODEL_DIR to a folder "
            "or a bucket that you may read and write; for a bucket gcsfs must be installed."
        ) from error
    if text is None:
        return
    remedy = (
        "Use a new MODEL_DIR, or the old settings, or accept the difference with "
        "--allow_changed_config (the old file is kept)."
    )
    try:
        saved = parse_text(text, roots=(config.root,), name=str(path))
    except ValueError as error:
        raise GinError(
            f"the configuration saved in {path} cannot be read any more: {error}\n{remedy}"
        ) from error

    def lines(settings: Sequence[Setting]) -> list[str]:
        return [
            str(setting)
            for setting in settings
            if not any(fnmatch.fnmatchcase(o, p) for o in setting.owners for p in may_change)
        ]

    difference = difflib.unified_diff(
        lines(saved.settings), lines(config.settings), str(path), "now", n=0, lineterm=""
    )
    changed = [line for line in difference if not line.startswith("@@")]
    if changed:
        shown = "\n".join(f"  {line}" for line in changed)
        raise GinError(f"{model_dir} holds a run of another configuration:\n{shown}\n{remedy}")


def save_config(model_dir: str, config: GinConfig, *, command: str) -> None:
    """Writes the configuration atomically as config.gin in `model_dir`.

    An earlier file with another configuration is kept as config.<n>.gin.

    Args:
      model_dir: the run's folder, which is created if it does not exist.
      config: the configuration that runs.
      command: the command line, which the file records in a comment.

    Raises:
      ValueError: the folder cannot be written.
    """
    folder = epath.Path(model_dir)
    path = folder / _CONFIG_FILE
    text = f"# The whole configuration of a run, defaults included. Made by:\n# {command}\n"
    text += config.text
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            old = path.read_text()
            if old.endswith(config.text):
                return
            names = (folder / f"config.{number}.gin" for number in range(1, 1_000_000))
            next(name for name in names if not name.exists()).write_text(old)
        unfinished = folder / f".{_CONFIG_FILE}.{uuid.uuid4().hex}"
        unfinished.write_text(text)
        unfinished.replace(path)
    except Exception as error:  # Bucket libraries have their own exception types.
        told = error.strerror if isinstance(error, OSError) else None
        raise ValueError(
            f"model_dir must be a folder that can be written; got {model_dir} "
            f"({told or error!r}). Set MODEL_DIR to another folder."
        ) from error
