"""FLOPs of a traced function, with loops counted once per iteration.

The FLOPs are counted before compilation, so that they do not depend on sharding, on fusion, or on
values that the compiler decides to recompute.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal


def traced(function: Callable[..., Any], *arguments: Any, unknown_trips: int = 1) -> float:
    """Returns the FLOPs of the matrix products in a call of a function, over all devices.

    Args:
      function: function to trace.
      *arguments: arrays or their shapes.
      unknown_trips: trip count assumed for loops whose number of iterations depends on the data.
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
        # Only one branch of a conditional is executed. The most expensive branch is counted.
        total += times * (max(costs, default=0.0) if kind == "cond" else sum(costs))
    return total


def _trips(condition: Any) -> int | None:
    """Returns the constant upper limit in a loop's condition; None if it is not a constant."""
    for equation in condition.eqns:
        if equation.primitive.name == "lt" and isinstance(equation.invars[1], Literal):
            return int(equation.invars[1].val)
    return None


def _inner(settings: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs nested in an operation."""
    for name, value in settings.items():
        if name in ("fwd_jaxpr_thunk", "bwd"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
