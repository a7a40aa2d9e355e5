"""Writes a checked configuration as a gin file with all defaults, and as a list of settings."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from gkd_jax.experiment.gin_files.names import canonical_target
from gkd_jax.experiment.gin_files.statements import (
    MACRO,
    Binding,
    Bindings,
    Key,
    Location,
    Reference,
    Target,
    references,
)
from gkd_jax.experiment.gin_files.walk import Walk


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value of a configuration.

    Attributes:
      path: parameters that lead from the root to the value, such as `objective.divergence.beta`.
        The path does not depend on scopes or macros.
      owners: the same parameters, each as `Class.parameter`.
      value: text of the value.
    """

    path: str
    owners: tuple[str, ...]
    value: str

    def __str__(self) -> str:
        return f"{self.path} = {self.value}"


def with_defaults(bindings: Bindings, root: Target) -> Bindings:
    """Adds bindings for the defaults of all objects that are built, if gin can express them.

    A default that is a dataclass becomes a reference in its own scope, so that bindings for other
    objects of its class do not apply to it.
    """
    expanded = dict(bindings)
    calls = Walk(bindings, root).calls
    for target, scope in sorted(calls, key=lambda call: len(call[1])):
        if target == MACRO:
            continue
        for name, parameter in target.parameters().items():
            prefixes = (scope[:length] for length in range(len(scope) + 1))
            if not any(Key(prefix, target, name) in expanded for prefix in prefixes):
                expanded.update(_default_bindings(Key(scope, target, name), parameter.default))
    return expanded


def _default_bindings(key: Key, default: Any) -> Bindings:
    """Returns bindings that set `key` to `default`; an empty dict if gin cannot express that."""
    location = Location("defaults", 0)
    if _is_literal(default):
        return {key: Binding(key, default, location)}
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return {}
    kind = type(default)
    target = canonical_target(kind.__module__, kind.__qualname__, kind)
    scope = (*key.scope, f"{key.target.name}_{key.parameter}")
    bindings = {key: Binding(key, Reference(scope, target, evaluate=True), location)}
    for field in dataclasses.fields(default):
        if field.init:
            inner = Key(scope, target, field.name)
            found = _default_bindings(inner, getattr(default, field.name))
            if not found:
                return {}
            bindings |= found
    return bindings


def _is_literal(value: Any) -> bool:
    """Returns whether gin can parse `repr(value)`."""
    if type(value) is dict:
        return all(map(_is_literal, (*value.keys(), *value.values())))
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    if type(value) is float:
        return math.isfinite(value)
    return type(value) in (bool, int, str, type(None))


class Text:
    """A gin file with the bindings that a `Walk` found in use. `str()` returns its text."""

    def __init__(self, walk: Walk):
        self._walk = walk
        self._aliases = self._choose_aliases()

    def _choose_aliases(self) -> dict[str, str]:
        """Returns an alias for each module: the shortest end of its name that is unique."""
        aliases: dict[str, str] = {}
        for module in sorted({target.module for target, _ in self._walk.calls if target.module}):
            parts = module.split(".")
            for length in range(1, len(parts) + 1):
                alias = "_".join(parts[-length:])
                if alias not in aliases.values() and alias != "gin":
                    break
            aliases[module] = alias
        return aliases

    def __str__(self) -> str:
        lines = ["from __gin__ import dynamic_registration"]
        for module, alias in self._aliases.items():
            parent, _, name = module.rpartition(".")
            statement = f"from {parent} import {name}" if parent else f"import {name}"
            lines.append(statement if alias == name else f"{statement} as {alias}")
        macros: dict[str, str] = {}
        blocks: dict[tuple[str, str], dict[str, str]] = {}
        for key in self._walk.used:
            value = self._format(self._walk.bindings[key].value)
            if key.target == MACRO:
                macros["/".join(key.scope)] = value
            else:
                # Blocks are sorted by class, then by scope.
                block = (self._name(key.target), "/".join(key.scope))
                blocks.setdefault(block, {})[key.parameter] = value
        lines += ["", *(f"{name} = {value}" for name, value in sorted(macros.items()))]
        for (selector, scope), values in sorted(blocks.items()):
            prefix = f"{scope}/{selector}" if scope else selector
            lines.append("")
            lines += [
                f"{prefix}.{parameter} = {text}" for parameter, text in sorted(values.items())
            ]
        return "\n".join(lines) + "\n"

    def _name(self, target: Target) -> str:
        return f"{self._aliases[target.module]}.{target.name}"

    def _format(self, value: Any) -> str:
        """Formats a value as gin parses it."""
        if isinstance(value, Reference):
            if value.target == MACRO:
                return f"%{'/'.join(value.scope)}"
            selector = "/".join((*value.scope, self._name(value.target)))
            return f"@{selector}{'()' if value.evaluate else ''}"
        inner = self._format
        if isinstance(value, dict):
            return "{" + ", ".join(f"{inner(k)}: {inner(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return f"[{', '.join(map(inner, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(inner, value))}{',' if len(value) == 1 else ''})"
        return repr(value)


def list_settings(walk: Walk, root: Target) -> tuple[Setting, ...]:
    """Lists every value of every object that is built, in the order of construction."""
    return tuple(_settings_of_call(walk, root, (), "", ()))


def _settings_of_call(
    walk: Walk, target: Target, scope: tuple[str, ...], path: str, owners: tuple[str, ...]
) -> Iterator[Setting]:
    bound = walk.effective(target, scope)
    for name in dict.fromkeys((*target.parameters(), *bound)):
        inner_path = f"{path}.{name}" if path else name
        inner_owners = (*owners, f"{target.name}.{name}")
        if name in bound:
            value = bound[name].value
            yield from _settings_of_value(walk, value, scope, inner_path, inner_owners)
        else:
            default = target.parameters()[name].default
            if dataclasses.is_dataclass(default):
                # Memory addresses in the repr differ from run to run.
                text = re.sub(r" at 0x[0-9a-f]+", "", repr(default))
                yield Setting(inner_path, inner_owners, text)


def _settings_of_value(
    walk: Walk, value: Any, scope: tuple[str, ...], path: str, owners: tuple[str, ...]
) -> Iterator[Setting]:
    if isinstance(value, Reference):
        if value.target == MACRO:
            bound = walk.effective(MACRO, value.scope)["value"].value
            yield from _settings_of_value(walk, bound, value.scope, path, owners)
            return
        text = f"@{value.target.module}.{value.target.name}{'()' if value.evaluate else ''}"
        yield Setting(path, owners, text)
        yield from _settings_of_call(walk, value.target, value.scope or scope, path, owners)
    elif isinstance(value, dict | list | tuple) and any(references(value)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, element in items:
            yield from _settings_of_value(walk, element, scope, f"{path}[{key!r}]", owners)
    else:
        yield Setting(path, owners, repr(value))
