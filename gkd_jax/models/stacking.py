"""Parameters of layers, each on its own or stacked: 'layers_0/...', 'layers_1/...' or 'layers/...'.

A network that runs over its layers by `lax.scan` is compiled as one layer, however many it has, and
has their parameters stacked along a first axis. Checkpoints for others have each on its own, and a
checkpoint of either form serves a network of the other.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from gkd_jax.common.array_types import PyTree

STACKED = "layers"
"""The name of stacked layers, and the logical axis along which they lie."""

_LAYER = re.compile(rf"{STACKED}_(\d+)")


@dataclasses.dataclass(frozen=True)
class Section:
    """Successive layers whose kinds repeat with a period.

    Attributes:
      start: number of the first layer.
      kinds: the kinds of the layers of one period.
      turns: how often the period occurs.
    """

    start: int
    kinds: tuple[Any, ...]
    turns: int

    @property
    def period(self) -> int:
        """Layers of one turn."""
        return len(self.kinds)

    @property
    def num_layers(self) -> int:
        """Layers of all turns."""
        return self.period * self.turns


def sections(kinds: Sequence[Any]) -> tuple[Section, ...]:
    """Divides layers into sections that are few and compile to few bodies.

    A body is compiled for each layer of each section's period. 26 layers of Gemma 3, of which
    every sixth is another kind, are four turns of six and then two turns of one.

    Args:
      kinds: the kind of each layer; hashable.
    """
    return _sections(tuple(kinds))


@functools.lru_cache(maxsize=64)
def _sections(kinds: tuple[Any, ...]) -> tuple[Section, ...]:
    # The best division of the first n layers: its cost, its bodies, its sections.
    best: list[tuple[int, int, tuple[Section, ...]]] = [(0, 0, ())]
    for end in range(1, len(kinds) + 1):
        candidates = []
        for period in range(1, end + 1):
            start = end - period
            pattern = kinds[start:end]
            while start >= 0 and kinds[start : start + period] == pattern:
                cost, bodies, before = best[start]
                section = Section(start, pattern, (end - start) // period)
                # A loop counts as two bodies more: one of a period comes before several of parts.
                candidates.append((cost + period + 2, bodies + period, (*before, section)))
                start -= period
        best.append(min(candidates, key=lambda candidate: candidate[:2]))
    return best[-1][2]


def are_stacked(names: Iterable[str]) -> bool:
    """Whether parameters of these names, such as 'decoder/layers/mlp/wo/kernel', are stacked."""
    return any(STACKED in name.split("/") for name in names)


def names_of_layers(name: str, depth: int) -> list[str]:
    """What 'decoder/layers/mlp' is called in each of the layers that are stacked."""
    return [
        re.sub(rf"(^|/){STACKED}(?=/|$)", rf"\g<1>{STACKED}_{number}", name)
        for number in range(depth)
    ]


def stack(params: PyTree[Any], join: Callable[..., Any] | None = None) -> PyTree[Any]:
    """Stacks the layers of a parameter tree, or of one like it.

    Args:
      params: nested dictionaries with 'layers_0', 'layers_1', ...
      join: makes one leaf of those of all layers; None stacks arrays along a new first axis.
    """
    if not isinstance(params, dict):
        return params
    join = join or (lambda *leaves: jnp.stack(leaves))
    numbered = {int(match[1]): name for name in params if (match := _LAYER.fullmatch(name))}
    rest = {
        name: stack(value, join) for name, value in params.items() if name not in numbered.values()
    }
    if not numbered:
        return rest
    in_order = [params[numbered[number]] for number in sorted(numbered)]
    return rest | {STACKED: jax.tree.map(join, *in_order)}


def unstack(params: PyTree[Any], take: Callable[[Any, int], Any] | None = None) -> PyTree[Any]:
    """Undoes `stack`.

    Args:
      params: nested dictionaries with 'layers'.
      take: makes the leaf of a layer of the stacked one; None takes a row of the array.
    """
    if not isinstance(params, dict):
        return params
    take = take or (lambda leaf, number: leaf[number])
    rest = {name: unstack(value, take) for name, value in params.items() if name != STACKED}
    if STACKED not in params:
        return rest
    stacked = params[STACKED]
    depth = jax.tree.leaves(stacked)[0].shape[0]
    layers = {
        f"{STACKED}_{number}": jax.tree.map(lambda leaf, n=number: take(leaf, n), stacked)
        for number in range(depth)
    }
    return rest | layers


def split(params: PyTree[Any]) -> tuple[list[PyTree[Any]], PyTree[Any]]:
    """Takes the stacked layers out of a tree: one tree for each stack, and the rest."""
    flat = traverse_util.flatten_dict(params, keep_empty_nodes=True)
    stacks: dict[Any, dict[Any, Any]] = {}
    rest = {}
    for path, leaf in flat.items():
        if STACKED in path:
            stacks.setdefault(path[: path.index(STACKED)], {})[path] = leaf
        else:
            rest[path] = leaf
    trees = [traverse_util.unflatten_dict(stacks[path]) for path in sorted(stacks)]
    return trees, traverse_util.unflatten_dict(rest)


def merge(stacks: Iterable[PyTree[Any]], rest: PyTree[Any]) -> PyTree[Any]:
    """Undoes `split`."""
    flat = traverse_util.flatten_dict(rest, keep_empty_nodes=True)
    for tree in stacks:
        flat |= traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(flat)
