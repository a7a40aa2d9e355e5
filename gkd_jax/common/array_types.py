"""Names of array types.

Letters in shapes have fixed meanings: B batch, S source (input) length, T target length,
V vocabulary, D model width, H heads, K head size, N samples per prompt.
"""

from typing import Any, TypeAlias

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

Params: TypeAlias = PyTree[Any]
"""A tree of parameter arrays, as returned by `flax.linen` (unboxed)."""

Metrics: TypeAlias = dict[str, tuple[Any, Any]]
"""Maps metric names to (sum, weight). Divide only after summing over batches and hosts."""

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Metrics", "Params", "PyTree"]
