"""Resolves names in gin files to classes and functions, including their former names."""

import functools
import importlib
import pathlib
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from absl import logging
from gin import config_parser

from gkd_jax.common import moved
from gkd_jax.experiment.gin_files.statements import GinError, Target, did_you_mean

_PACKAGE = pathlib.Path(__file__).parents[2]


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning once for each message."""
    logging.warning("%s", message)


class Namespace:
    """The imports of one gin file.

    Attributes:
      modules: the imported modules, by the names that the file gives them.
      is_dynamic: whether the file has imported `dynamic_registration`.
    """

    def __init__(self) -> None:
        self.modules: dict[str, types.ModuleType] = {}
        self.is_dynamic = False

    def add_import(self, statement: config_parser.ImportStatement) -> None:
        """Imports the module of an import statement.

        Raises:
          GinError: the module does not exist or cannot be imported.
        """
        module = _import(statement.module)
        name = statement.bound_name()
        if statement.is_from or statement.alias:
            self.modules[name] = module
        else:
            self.modules[name] = importlib.import_module(name)

    def resolve(self, selector: str) -> Target:
        """Returns the class or function that `selector` names.

        Raises:
          GinError: `selector` names neither; the message suggests the nearest names.
        """
        first, *rest = selector.split(".")
        value: Any = self._module(first, selector)
        for name in rest:
            if not isinstance(value, types.ModuleType):
                raise GinError(
                    f"'{selector}' is not the name of a class or function: only those of a module "
                    "can be configured."
                )
            module, value = _attribute(value, name)
        if not callable(value):
            raise GinError(
                f"'{selector}' is not the name of a class or function. A parameter is bound as "
                "`module.Class.parameter = value`, a macro has no dot in its name."
            )
        return canonical_target(module.__name__, rest[-1], value, written=selector)

    def _module(self, name: str, selector: str) -> types.ModuleType:
        """Returns the module that this file imported as `name`, or older gin files call `name`."""
        if name in self.modules:
            return self.modules[name]
        module = moved.gin_alias(name)
        if module is not None:
            # The file may import the module itself, or a package that re-exports its names.
            homes = {module, *_parents(module)}
            present = [bound for bound, home in self.modules.items() if home.__name__ in homes]
            if present:
                warn_once(f"'{name}.' is now '{present[0]}.' in gin files.")
                return importlib.import_module(module)
        problem = f"'{name}' (in '{selector}') is not imported in this file."
        imports = [f"`{_import_line(found)}`" for found in _modules_of_the_package().get(name, ())]
        if imports:
            raise GinError(f"{problem} Import it: {' or '.join(imports)}.")
        raise GinError(
            problem
            + (
                did_you_mean(name, self.modules)
                or did_you_mean(name, _modules_of_the_package())
                or f" Import its module, e.g. `import {name}`."
            )
        )


def _parents(module: str) -> list[str]:
    """Lists the full names of the packages that contain a module, without the outermost."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(2, len(parts))]


def _import(name: str) -> types.ModuleType:
    wanted = moved.present_module(name)
    if wanted is None:
        wanted = name
    else:
        warn_once(f"{name} is now {wanted}. Import that in gin files.")
    try:
        return importlib.import_module(wanted)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{wanted}.".startswith(f"{missing}."):
            raise GinError(f"importing {wanted} failed: {error}. Install what it needs.") from error
        raise GinError(
            f"there is no module '{wanted}'.{did_you_mean(wanted, _near_modules(wanted, missing))} "
            "A module of your own must be importable: set PYTHONPATH to its folder."
        ) from error
    except (ImportError, SyntaxError) as error:
        raise GinError(f"importing {wanted} failed: {error}. Correct that module.") from error


def _near_modules(wanted: str, missing: str) -> list[str]:
    """Lists the full names of modules that the user may have meant by `wanted`.

    `missing` is the first part of `wanted` that does not exist. The result has the modules of this
    package with the same last name, or else the modules beside `missing`.
    """
    parent = missing.rpartition(".")[0]
    if not parent:
        return [module.name for module in pkgutil.iter_modules()]
    if parent.split(".")[0] == _PACKAGE.name:
        same_name = _modules_of_the_package().get(wanted.rpartition(".")[2])
        if same_name:
            return same_name
    paths = importlib.import_module(parent).__path__
    rest = wanted.removeprefix(missing)
    return [f"{parent}.{module.name}{rest}" for module in pkgutil.iter_modules(paths)]


def _attribute(module: types.ModuleType, name: str) -> tuple[types.ModuleType, Any]:
    """Returns a module and its attribute `name`.

    If `name` is a former name, returns the present module and attribute.
    """
    renamed = moved.present_name(module.__name__, name)
    if renamed is not None:
        home, present = renamed
        warn_once(f"{module.__name__}.{name} is now {home}.{present}. Use that in gin files.")
        module, name = importlib.import_module(home), present
    if not hasattr(module, name):
        present_module = moved.present_module(f"{module.__name__}.{name}")
        if present_module is not None:
            # `name` is the former name of a submodule, of which `_import` has warned already.
            return module, importlib.import_module(present_module)
        raise GinError(f"{module.__name__} has no '{name}'.{did_you_mean(name, _public(module))}")
    return module, getattr(module, name)


def _public(module: types.ModuleType) -> set[str]:
    """Lists the public names of a module, including the names that a package re-exports lazily."""
    exported = getattr(module, "_EXPORTS", {}).values()
    return {name for name in vars(module) if name[0] != "_"}.union(*exported)


@functools.cache
def _modules_of_the_package() -> dict[str, list[str]]:
    """Returns the full names of this package's modules, grouped by the last part of their names."""
    modules: dict[str, list[str]] = {}
    for file in sorted(_PACKAGE.rglob("*.py")):
        path = file.parent if file.stem == "__init__" else file.with_suffix("")
        if path != _PACKAGE:
            parts = path.relative_to(_PACKAGE.parent).parts
            modules.setdefault(parts[-1], []).append(".".join(parts))
    return modules


def _import_line(module: str) -> str:
    parent, _, name = module.rpartition(".")
    return f"from {parent} import {name}"


def canonical_target(
    module: str, name: str, function: Callable[..., Any], *, written: str = ""
) -> Target:
    """Returns the target of a class or function, which does not depend on how it was imported.

    The target's module is the package that re-exports the function, or else the module that defines
    it. If neither module has the function under its own name, `module` and `name` are used.

    Args:
      module: full name of the module in which the function was found.
      name: name of the function in that module.
      function: the class or function.
      written: name of the function in the gin file.
    """
    home = getattr(function, "__module__", None) or module
    home_name = getattr(function, "__qualname__", name)
    is_public = not any(part.startswith("_") for part in home.split("."))
    if is_public and getattr(sys.modules.get(home), home_name, None) is function:
        package = home.rpartition(".")[0]
        is_exported = getattr(sys.modules.get(package), home_name, None) is function
        return Target(package if is_exported else home, home_name, function, written)
    return Target(module, name, function, written)


def find_known(selector: str, targets: Iterable[Target]) -> Target | None:
    """Returns the target whose full name ends with `selector`, or None if there is no such target.

    `selector` is a name of a class or function that a flag gives, such as `Rollout`.

    Raises:
      GinError: the names of several targets end with `selector`.
    """

    def is_end_of(names: Iterable[str]) -> bool:
        return any(f".{name}".endswith(f".{selector}") for name in names)

    known = [target for target in targets if is_end_of(_present_names(target))]
    if not known:
        known = [target for target in targets if is_end_of(_former_names(target))]
        if known:
            warn_once(f"{selector} is now {known[0].module}.{known[0].name}. Use that in flags.")
    if len(known) > 1:
        names = sorted(f"{target.module}.{target.name}" for target in known)
        raise GinError(f"'{selector}' may be any of {names}. Give more of its name.")
    return known[0] if known else None


def _present_names(target: Target) -> set[str]:
    """Lists a target's full names, in the re-exporting and in the defining module."""
    home = getattr(target.function, "__module__", None) or target.module
    return {f"{module}.{target.name}" for module in (target.module, home)}


def _former_names(target: Target) -> list[str]:
    home = getattr(target.function, "__module__", None) or target.module
    modules = moved.former_modules(target.module)
    return moved.former_names(home, target.name) + [f"{module}.{target.name}" for module in modules]


def present_macro(name: str) -> str:
    """Returns the present name of a macro; logs a warning if `name` is a former one."""
    present = moved.present_macro(name)
    if present is None:
        return name
    warn_once(f"the macro {name} is now {present}. Use that in gin files and flags.")
    return present


def present_scope(scope: str) -> tuple[str, ...]:
    """Returns the parts of a scope, with former names of macros replaced by present names.

    Scopes may be named after macros: the value of a macro is built in such a scope, and a saved
    configuration binds the defaults of the value there.
    """
    return tuple(present_macro(part) for part in scope.split("/")) if scope else ()


def present_parameter(target: Target, name: str) -> str:
    """Returns the present name of a parameter; logs a warning if `name` is a former one."""
    present = None if name in target.parameters() else moved.present_setting(target.function, name)
    if present is None:
        return name
    warn_once(f"{target}.{name} is now {target}.{present}. Use that in gin files.")
    return present
