"""Data: sources of raw examples, tasks, vocabularies, the input pipeline, and metrics of texts.

This package does not depend on models. Start with the modules `task`, which defines a task, and
`pipeline`, which makes batches from a task. `recipes` contains the tasks of the paper, `metrics`
the functions that score generated texts.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {
    "pipeline": ("Dataset", "DatasetConfig"),
    "task": ("Task", "TextExample"),
    "recipes.text": ("FieldsToText",),
    "registry": ("get_task", "register_task"),
    "sources": ("InMemory", "JsonLines", "ParallelText", "TfdsSource", "Tsv"),
    "mixtures": ("Mixture", "Templated"),
}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
