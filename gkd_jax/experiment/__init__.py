"""A run as data: the settings that a gin file binds, and the checks before any long work.

This room compiles and trains nothing. Start with `experiment.Experiment` and `settings`. `prepare`
opens the data and checks everything, with the checks in `checks`; `plan` describes the run;
`gin_files` parses gin files and is the only part that imports gin.
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
