"""FLOPs of a function as it is written, loops counted as often as they run.

An account of the program before the compiler: what it shards, fuses or recomputes is not in it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal


def traced(function: Callable[..., Any], *arguments: Any, unknown_trips: int = 1) -> float:
    """FLOPs of the matrix products and convolutions of a call, over all devices.

    Args:
      function: to be traced.
      arguments: arrays, or their shapes.
      unknown_trips: how often loops run whose number of runs depends on data.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr, unknown_trips)


def _of(jaxpr: Any, unknown_trips: int) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        kind, settings = equation.primitive.name, equation.params
        if kind == "dot_general":
            left, result = equation.invars[0].aval, equation.outvars[0].aval
            (summed, _), _ = settings["dimension_numbers"]
            total += 2.0 * result.size * math.prod(left.shape[axis] for axis in summed)
            continue
        costs = [_of(inner, unknown_trips) for inner in _inner(settings)]
        times = 1
        if kind == "scan":
            times = settings["length"]
        elif kind == "while":
            times = _trips(settings["cond_jaxpr"].jaxpr) or unknown_trips
        elif kind == "shard_map":
            sizes = settings["mesh"].shape
            times = math.prod(sizes[axis] for axis in settings["newly_manual_axes"])
        # Of branches one is taken.
        total += times * (max(costs, default=0.0) if kind == "cond" else sum(costs))
    return total


def _trips(condition: Any) -> int | None:
    """The whole number that a loop's condition compares its counter with."""
    for equation in condition.eqns:
        if equation.primitive.name == "lt" and isinstance(equation.invars[1], Literal):
            return int(equation.invars[1].val)
    return None


def _inner(settings: dict[str, Any]) -> Iterator[Any]:
    """The programs within an operation."""
    for name, value in settings.items():
        if name in ("fwd_jaxpr_thunk", "bwd"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
