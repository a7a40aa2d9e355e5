"""Two forms of the layers' parameters: separate ('layers_0/...', 'layers_1/...') or stacked.

A network that loops over its layers (`lax.scan`) compiles one layer instead of all. The parameters
of its layers are stacked along a new first axis and named 'layers/...'. Other networks and exported
checkpoints have separate parameters for each layer. Checkpoints of one form can be loaded into
networks of the other.
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
"""The name of the stacked layers, and of the logical axis along which they are stacked."""

_LAYER = re.compile(rf"{STACKED}_(\d+)")


@dataclasses.dataclass(frozen=True)
class Section:
    """Successive layers whose kinds repeat with a period.

    Attributes:
      start: index of the first layer.
      kinds: the kinds of the layers of one period.
      turns: number of periods.
    """

    start: int
    kinds: tuple[Any, ...]
    turns: int

    @property
    def period(self) -> int:
        """Number of layers of one period."""
        return len(self.kinds)

    @property
    def num_layers(self) -> int:
        """Number of layers of the section."""
        return self.period * self.turns


def sections(kinds: Sequence[Any]) -> tuple[Section, ...]:
    """Divides layers into sections so that few layers have to be compiled.

    For each section, only the layers of one period are compiled. For example, Gemma 3 1B has 26
    layers, and every sixth layer has full attention instead of a sliding window. These layers are
    divided into a section of four periods of six layers and a section of two periods of one layer.

    Args:
      kinds: the kind of each layer, a hashable value.
    """
    return _sections(tuple(kinds))


@functools.lru_cache(maxsize=64)
def _sections(kinds: tuple[Any, ...]) -> tuple[Section, ...]:
    # best[n] is the best division of the first n layers, as a tuple (cost, number of layers to
    # compile, sections).
    best: list[tuple[int, int, tuple[Section, ...]]] = [(0, 0, ())]
    for end in range(1, len(kinds) + 1):
        candidates = []
        for period in range(1, end + 1):
            start = end - period
            pattern = kinds[start:end]
            while start >= 0 and kinds[start : start + period] == pattern:
                cost, compiled, before = best[start]
                section = Section(start, pattern, (end - start) // period)
                # Each loop adds the cost of two layers, so that one loop over a long period is
                # preferred to several loops over parts of this period.
                candidates.append((cost + period + 2, compiled + period, (*before, section)))
                start -= period
        best.append(min(candidates, key=lambda candidate: candidate[:2]))
    return best[-1][2]


def are_stacked(names: Iterable[str]) -> bool:
    """Returns whether any name is in stacked layers, such as 'decoder/layers/mlp/wo/kernel'."""
    return any(STACKED in name.split("/") for name in names)


def names_of_layers(name: str, depth: int) -> list[str]:
    """Converts a name in stacked layers, such as 'decoder/layers/mlp', to one name per layer."""
    return [
        re.sub(rf"(^|/){STACKED}(?=/|$)", rf"\g<1>{STACKED}_{number}", name)
        for number in range(depth)
    ]


def stack(params: PyTree[Any], join: Callable[..., Any] | None = None) -> PyTree[Any]:
    """Stacks the layers of a parameter tree, or of a tree of the same structure.

    Args:
      params: nested dictionaries with 'layers_0', 'layers_1', ...
      join: function that joins the leaves of all layers into one leaf. None stacks arrays along a
        new first axis.
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
    """Inverse of `stack`.

    Args:
      params: nested dictionaries with 'layers'.
      take: function of a stacked leaf and a layer's index that returns the leaf of the layer. None
        indexes the first axis of arrays.
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
    """Splits a tree into a list with one tree for each stack of layers, and a tree of the rest."""
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
    """Inverse of `split`."""
    flat = traverse_util.flatten_dict(rest, keep_empty_nodes=True)
    for tree in stacks:
        flat |= traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(flat)
