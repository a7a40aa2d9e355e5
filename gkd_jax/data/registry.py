"""The registry of tasks by name: tasks of users, of gkd_jax and of seqio."""

import difflib
import functools
import sys

from gkd_jax.data import recipes, seqio_adapter
from gkd_jax.data.task import Task, import_task_module

_registry: dict[str, Task] = {}


@functools.cache
def _own_tasks() -> dict[str, Task]:
    """Returns the package's tasks with their default sources, by name."""
    return {task.name: task for task in (recipe() for recipe in recipes.NAMED)}


def register_task(task: Task) -> Task:
    """Registers a task under its name, and returns it.

    Raises:
      ValueError: another task with this name is registered.
    """
    if _registry.setdefault(task.name, task) != task:
        raise ValueError(
            f"Another task is already registered as {task.name!r}. Give one of them another "
            "Task.name."
        )
    return task


def get_task(name: str, *, module: str | None = None) -> Task:
    """Returns a task by name: a registered task, else one of gkd_jax, else one of seqio.

    Args:
      name: name of a task or mixture (`MIXTURE_OR_TASK_NAME`).
      module: a module to import first, which registers tasks with `register_task` or with
        seqio (`MIXTURE_OR_TASK_MODULE`).

    Returns:
      The task; seqio tasks and mixtures are wrapped by `gkd_jax.data.seqio_adapter`.

    Raises:
      ValueError: no task has this name (the message has the nearest names), or the module does not
        exist.
    """
    if module is not None:
        import_task_module(module)
    known = _own_tasks() | _registry
    if name in known:
        return known[name]
    names = set(known)
    # If seqio is not imported yet, no seqio task is registered, so the slow import is skipped.
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
