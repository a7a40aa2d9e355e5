"""Tasks by name: those that users registered, then those of gkd_jax, then those of seqio."""

import difflib
import functools
import sys

from gkd_jax.data import recipes, seqio_adapter
from gkd_jax.data.task import Task, import_task_module

_registry: dict[str, Task] = {}


@functools.cache
def _own_tasks() -> dict[str, Task]:
    """The package's tasks with their default sources, by name."""
    return {task.name: task for task in (recipe() for recipe in recipes.NAMED)}


def register_task(task: Task) -> Task:
    """Makes a task known to `get_task` under its name; returns it.

    Raises:
      ValueError: another task has this name.
    """
    if _registry.setdefault(task.name, task) != task:
        raise ValueError(
            f"Another task is already registered as {task.name!r}. Give one of them another "
            "Task.name."
        )
    return task


def get_task(name: str, *, module: str | None = None) -> Task:
    """Finds a task by name: registered ones first, then gkd_jax's own, then seqio's.

    Args:
      name: the task's or mixture's name (`MIXTURE_OR_TASK_NAME`).
      module: a module to import first, which registers tasks with `register_task` or with
        seqio (`MIXTURE_OR_TASK_MODULE`).

    Returns:
      The task; a seqio task or mixture comes through `gkd_jax.data.seqio_adapter`.

    Raises:
      ValueError: no task has this name (names the nearest), or there is no such module.
    """
    if module is not None:
        import_task_module(module)
    known = _own_tasks() | _registry
    if name in known:
        return known[name]
    names = set(known)
    # Without seqio imported, nothing can be in its registry: its slow import is not needed.
    if "seqio" in sys.modules:
        if name in seqio_adapter.seqio_names():
            return seqio_adapter.seqio_task(name)
        names.update(seqio_adapter.seqio_names())
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"Did you mean {', '.join(map(repr, near))}?" if near else f"Known: {sorted(names)}."
    raise ValueError(
        f"MIXTURE_OR_TASK_NAME {name!r} names no task. {hint} A task of your own: name the module "
        "that registers it in MIXTURE_OR_TASK_MODULE."
    )
