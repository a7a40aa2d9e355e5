"""Finds the calls that gin would make to build a root, to detect unused and missing bindings.

gin's rules for scopes:
- A call receives the bindings in every prefix of its scope. Inner scopes override outer ones.
- `@f()` is called in the scope of the caller, and `@a/f()` in the scope `a`.
- The value of a macro is built in a scope with the macro's name.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax.experiment.gin_files.statements import (
    MACRO,
    REQUIRED,
    Binding,
    Bindings,
    Key,
    Target,
    did_you_mean,
    references,
)

_Call = tuple[Target, tuple[str, ...]]


class Walk:
    """The calls and bindings that a root is built from.

    Attributes:
      bindings: all bindings.
      used: keys of the bindings that at least one call receives. A call does not receive a binding
        that an inner scope overrides.
      calls: the calls that gin would make, each a target and its active scope, in order.
      missing: for the key of each missing value, the reason why the value is required.
      undefined: for each macro without a value, a binding that refers to it.
      cycles: objects that are built from themselves.
    """

    def __init__(self, bindings: Bindings, root: Target):
        self.bindings = bindings
        self.used: set[Key] = set()
        self.calls: dict[_Call, None] = {}
        self.missing: dict[str, str] = {}
        self.undefined: dict[str, Binding] = {}
        self.cycles: list[str] = []
        self._keys: dict[Target, list[Key]] = {}
        for key in sorted(bindings, key=lambda key: len(key.scope)):
            self._keys.setdefault(key.target, []).append(key)
        self._call(root, (), evaluate=True, path=(), origin=None)

    def effective(self, target: Target, scope: tuple[str, ...]) -> dict[str, Binding]:
        """Returns the bindings that a call in `scope` receives, by parameter."""
        found = {}
        for key in self._keys.get(target, ()):
            if key.scope == scope[: len(key.scope)]:
                found[key.parameter] = self.bindings[key]
        self.used.update(binding.key for binding in found.values())
        return found

    def _call(
        self,
        target: Target,
        scope: tuple[str, ...],
        *,
        evaluate: bool,
        path: tuple[_Call, ...],
        origin: Binding | None,
    ) -> None:
        call = (target, scope)
        if call in path:
            self.cycles.append(str(Key(scope, target, "value")))
            return
        if call in self.calls:
            return
        self.calls[call] = None
        bound = self.effective(target, scope)
        if target == MACRO and not bound and origin is not None:
            self.undefined["/".join(scope)] = origin
        if target != MACRO and evaluate:
            self._note_missing_parameters(target, scope, bound)
        for binding in bound.values():
            if _contains_required(binding.value):
                self.missing[str(binding.key)] = f"required by {binding.location}"
            for reference in references(binding.value):
                follow = functools.partial(
                    self._call,
                    reference.target,
                    evaluate=reference.evaluate,
                    path=(*path, call),
                    origin=binding,
                )
                # A reference's own scope replaces the caller's scope.
                follow(reference.scope or scope)
                if not reference.evaluate and not reference.scope:
                    # The object that receives the function calls it later, without a scope.
                    follow(())

    def _note_missing_parameters(
        self, target: Target, scope: tuple[str, ...], bound: Mapping[str, Binding]
    ) -> None:
        for name, parameter in target.parameters().items():
            is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and name not in bound and not is_variadic:
                key = Key(self._without_macros(scope), target, name)
                self.missing[str(key)] = f"{target} has no default for it"

    def _without_macros(self, scope: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the prefix of a scope that ends before the first macro.

        Users write only this prefix. A call in the whole scope also receives the bindings in the
        prefix.
        """
        macros = {key.scope for key in self.bindings if key.target == MACRO}
        named = (index for index, name in enumerate(scope) if (name,) in macros)
        return scope[: next(named, len(scope))]


def _contains_required(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_contains_required, value))
    return value is REQUIRED


def merge(statements: Sequence[Binding], root: Target) -> tuple[Bindings, set[Binding]]:
    """Merges statements in order; the last one wins.

    Returns:
      The merged bindings, and the bindings that were in use before a later statement overrode one
      of the bindings. It is not an error if the overriding statement makes such a binding unused.
      For example, if a file replaces the optimizer of an included file, the learning rate of the
      old optimizer stays bound.
    """
    merged: Bindings = {}
    overridden: set[Binding] = set()
    bound: set[tuple[Target, str, tuple[str, ...]]] = set()
    for statement in statements:
        key = statement.key
        # A binding in an inner scope also overrides a binding in an outer scope.
        name = (key.target, key.parameter, key.scope if key.target == MACRO else ())
        if name in bound:
            overridden.update(merged[used] for used in Walk(merged, root).used)
        bound.add(name)
        merged[key] = statement
    return merged, overridden


def unused_problem(binding: Binding, walk: Walk) -> str:
    """Describes why `binding` is not used, and suggests the nearest name that is used."""
    key = binding.key
    if key.target == MACRO:
        others = ["/".join(scope) for target, scope in walk.calls if target == MACRO]
        return (
            f"{binding.location}: the macro {key} is not used: no value in use refers to %{key}."
            f"{did_you_mean(str(key), others)}"
        )
    calls = [Key(scope, target, key.parameter) for target, scope in walk.calls]
    names = [str(call) for call in calls if call.target == key.target]
    if any(
        call.target == key.target and call.scope[: len(key.scope)] == key.scope for call in calls
    ):
        return (
            f"{binding.location}: {key} has no effect: inner scopes override it, in use are "
            f"{', '.join(names)}. Bind one of those."
        )
    if names:
        return (
            f"{binding.location}: {key} is not used: in use are {', '.join(names)}."
            f"{did_you_mean(str(key), names)}"
        )
    scoped = "/".join((*key.scope, str(key.target)))
    others = ["/".join((*call.scope, str(call.target))) for call in calls]
    return (
        f"{binding.location}: {key} is not used: no value in use refers to @{scoped}()."
        f"{did_you_mean(scoped, others)}"
    )
