"""One run as data: what a gin file binds, and all checks before any long work.

It compiles and trains nothing. Start with `experiment.Experiment` and `settings`; `prepare` opens
and checks everything, `plan` tells what will run, `gin_files` reads gin, and is the only part that
does.
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
