"""What every room shares: `Batch`, names of array types, files that grow, names on the hub.

It knows nothing else of the package. Start with `batch`: it is what flows from the data through the
rollout to the training step.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {"batch": ("Batch", "TeacherDistributions", "TeacherTokens")}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
