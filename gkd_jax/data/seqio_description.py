"""Description, as plain data, of everything that determines the content of a seqio dataset."""

import functools
import hashlib
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

from gkd_jax.data.seqio_vocabulary import wrap_vocabulary

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MAX_DEPTH = 4


def describe(provider: Any, split: str) -> dict[str, Any]:
    """Describes a seqio task or mixture: sources, files, preprocessors, vocabularies, rates.

    Code is described by its source text and its closure, local files by size and modification time.
    Other modules and files that a function reads are not included. After changing them, remove the
    cached token files.
    """
    import seqio

    tasks = list(seqio.get_subtasks(provider))
    result: dict[str, Any] = {
        "seqio": seqio.__version__,
        "tasks": [_describe_task(task, split) for task in tasks if split in task.splits],
    }
    if isinstance(provider, seqio.Mixture):
        result["rates"] = [float(provider.get_rate(task)) for task in tasks]
        result["sample_fn"] = describe_value(provider._sample_fn)
    return result


def _describe_task(task: Any, split: str) -> dict[str, Any]:
    features = {
        key: [wrap_vocabulary(feature.vocabulary).fingerprint, feature.add_eos, str(feature.dtype)]
        for key, feature in task.output_features.items()
    }
    return {
        "name": task.name,
        "source": _describe_source(task.source),
        "files": [_describe_file(path) for path in task.source.list_shards(split)],
        "preprocessors": [describe_value(function) for function in task.preprocessors],
        "postprocessor": describe_value(task.postprocessor),
        "features": features,
    }


def _describe_source(source: Any) -> list[Any]:
    # Only attributes that are functions are described: a TFDS source sets some of the others when
    # it is first read.
    functions = {
        name: value
        for name, value in vars(source).items()
        if callable(value) and not inspect.isclass(value)
    }
    return [type(source).__qualname__, _ADDRESS.sub("", repr(source)), describe_value(functions)]


def _describe_file(path: Any) -> list[Any]:
    try:
        status = os.stat(path)
    except (OSError, TypeError, ValueError):  # A remote file, or the name of a shard.
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def describe_value(value: Any, depth: int = 0) -> Any:
    """Describes functions by their code and objects by their attributes, not by memory addresses.

    Args:
      value: any object.
      depth: current depth of the recursion, which is limited.
    """
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return repr(value)
    if depth == _MAX_DEPTH:
        return type(value).__qualname__

    def inner(element: Any) -> Any:
        return describe_value(element, depth + 1)

    if isinstance(value, functools.partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): inner(element) for key, element in sorted(value.items(), key=repr)}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [
            inner(element)
            for element in (
                sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            )
        ]
    if inspect.isfunction(value):
        return _describe_function(value, depth)
    if inspect.ismethod(value):
        return ["method", inner(value.__func__), inner(value.__self__)]
    if inspect.isclass(value) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    attributes = getattr(value, "__dict__", None)
    if attributes:
        return [name, inner(attributes)]
    return [name, _ADDRESS.sub("", repr(value))]


def _describe_function(function: Any, depth: int) -> list[Any]:
    wrapped = inspect.unwrap(function)
    try:
        code = inspect.getsource(wrapped)
    except (OSError, TypeError):
        code = repr((wrapped.__code__.co_code, wrapped.__code__.co_names))
    cells = []
    for one in (function, wrapped):
        for cell in one.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # The variable is not bound yet.
                continue
    return [
        f"{wrapped.__module__}.{wrapped.__qualname__}",
        hashlib.sha256(code.encode()).hexdigest(),
        describe_value(wrapped.__defaults__, depth + 1),
        describe_value(cells, depth + 1),
    ]
