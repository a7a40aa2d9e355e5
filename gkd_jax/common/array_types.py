"""Array types that every floor shares.

Letters in shapes are fixed: B batch, S source (input) length, T target length,
V vocabulary, D model width, H heads, K head size, N samples a prompt.
"""

from typing import Any, TypeAlias

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

Params: TypeAlias = PyTree[Any]
"""A tree of parameter arrays, as `flax.linen` makes them (unboxed)."""

Metrics: TypeAlias = dict[str, tuple[Any, Any]]
"""Metric name to (sum, weight). Divide only after summing over batches and hosts."""

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Metrics", "Params", "PyTree"]
