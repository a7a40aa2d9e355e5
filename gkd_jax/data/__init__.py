"""Text to batches: sources of raw examples, tasks, vocabularies, the pipeline; metrics of texts.

It knows no network. Start with `task`, which says what is learnt, and `pipeline`, which makes
batches of it; `recipes` has the tasks of the paper, `metrics` scores generated texts.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {
    "pipeline": (
        "Dataset",
        "DatasetConfig",
    ),
    "task": (
        "Task",
        "TextExample",
    ),
    "registry": (
        "get_task",
        "register_task",
    ),
}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
