"""Types and helpers that all other packages share: `Batch`, array types, growing files, the hub.

This package depends on no other part of gkd_jax. Start with the module `batch`: its type `Batch` is
passed from the data pipeline to the rollout and to the training step.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {"batch": ("Batch", "TeacherDistributions", "TeacherTokens")}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
