"""Settings of a run, as gin files bind them, and the checks made before the run starts.

This package compiles and trains nothing. Start with `experiment.Experiment` and `settings`.
`prepare` opens the data and makes the checks that `checks` defines. `plan` describes the run as
text. `gin_files` parses gin files and is the only part that imports gin.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {
    "experiment": ("Experiment",),
    "settings": (
        "Alarms",
        "Checkpoints",
        "Evaluation",
        "Export",
        "Generation",
        "NonFinite",
        "Storing",
        "Student",
    ),
}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
