"""Former names of modules and of what they define: users' imports and saved gin files keep working.

Data, and the import hook that reads it. An entry is never removed: folders of old runs name it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

_PACKAGE = "gkd_jax."

# Former name to present name, both within the package.
_MODULES = {
    "adapters": "experiment.checks.adapters",
    "appended": "common.growing_files",
    "array_types": "common.array_types",
    "batch": "common.batch",
    "chips": "devices.chips",
    "collectives": "devices.collectives",
    "compile_ahead": "run_modes.compile_ahead",
    "compile_parts": "training.programs",
    "compile_report": "run_modes.compile_report",
    "data.packing": "data.teacher_store_records",
    "dry_run": "run_modes.dry_run",
    "evaluate": "run_modes.evaluate",
    "export": "run_modes.export",
    "export_checks": "experiment.checks.exports",
    "flops": "devices.flops",
    "generate": "run_modes.generate",
    "gin_reader": "experiment.gin_files.reader",
    "gin_text": "experiment.gin_files.text",
    "gin_utils": "experiment.gin_files.configuration",
    "gin_walk": "experiment.gin_files.walk",
    "hf_checks": "experiment.checks.hugging_face",
    "hlo": "devices.hlo",
    "hlo_loops": "devices.hlo_loops",
    "hlo_text": "devices.hlo_text",
    "hub": "common.hub",
    "interactive": "run_modes.interactive",
    "interruption": "training.interruption",
    "last_step": "checkpoints.last_step",
    "meshes": "devices.mesh",
    "metrics": "data.metrics",
    "metrics.calculator": "data.metrics.calculator",
    "metrics.gsm8k": "data.metrics.gsm8k",
    "metrics.score": "data.metrics.score",
    "metrics.text_metrics": "data.metrics.text_metrics",
    "metrics_log": "training.metrics_log",
    "models.config": "models.t5_config",
    "non_finite": "training.non_finite",
    "optimizers": "distillation.optimizers",
    "output_checks": "experiment.checks.outputs",
    "partitioning": "devices.partitioning",
    "plan": "experiment.plan",
    "plots": "run_modes.plots",
    "prepare": "experiment.prepare",
    "pretrained": "checkpoints.pretrained",
    "profiling": "training.profiling",
    "replay": "distillation.replay",
    "reward_scorer": "training.rollout_scoring",
    "rewards": "distillation.rewards",
    "rollout": "distillation.rollout",
    "rules": "devices.rules",
    "sampling.policies": "sampling.teacher_assisted",
    "store_checks": "experiment.checks.stored_teacher",
    "store_teacher": "run_modes.store_teacher",
    "study": "run_modes.study",
    "supports": "distillation.stored_distributions",
    "teacher_tokens": "training.teacher_tokens",
    "teachers": "distillation.teachers",
    "train": "run_modes.train",
    "train_step": "distillation.train_step",
    "trainer": "training.trainer",
    "vocabulary_checks": "experiment.checks.vocabularies",
    "watchdog": "training.watchdog",
    "writers": "training.writers",
}

# What moved out of a module that is still there: (module, name) to the module that defines it now.
_NAMES = {
    ("data.task", "get_task"): "data.registry",
    ("data.task", "register_task"): "data.registry",
}


def present_module(name: str) -> str | None:
    """Returns the present full name of a module; None if `name` is not a former one."""
    inner = _MODULES.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) else None
    return None if inner is None else _PACKAGE + inner


def former_modules(name: str) -> list[str]:
    """Lists the former full names of a module."""
    inner = name.removeprefix(_PACKAGE)
    return [_PACKAGE + former for former, present in _MODULES.items() if present == inner]


def load_moved(module: str, name: str) -> Any:
    """Returns what a module used to define; the module calls it from its `__getattr__`.

    Args:
      module: `__name__` of the module.
      name: the attribute that was asked for.

    Raises:
      AttributeError: the module never defined it.
    """
    home = _NAMES.get((module.removeprefix(_PACKAGE), name))
    if home is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    message = f"{module}.{name} is now {_PACKAGE}{home}.{name}. Import it from there."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(_PACKAGE + home), name)


class _FormerLoader(importlib.abc.InspectLoader):
    """Loads a module under its former name: the very module, not a second copy of it."""

    def __init__(self, present: str):
        self._present = present
        self._spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        message = f"{spec.name} is now {self._present}. Import it by that name."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        module = importlib.import_module(self._present)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        # The import system has replaced it by that of the former name.
        module.__spec__ = self._spec

    def get_source(self, fullname: str) -> str | None:
        del fullname
        loader: Any = self._present_spec().loader
        return loader.get_source(self._present)

    def get_code(self, fullname: str) -> types.CodeType | None:
        """For `python -m` with a former name."""
        del fullname
        loader: Any = self._present_spec().loader
        return loader.get_code(self._present)

    @property
    def origin(self) -> str | None:
        """The module's file."""
        return self._present_spec().origin

    def _present_spec(self) -> importlib.machinery.ModuleSpec:
        spec = importlib.util.find_spec(self._present)
        assert spec is not None
        return spec


class FormerNames(importlib.abc.MetaPathFinder):
    """Finds modules of the package under their former names."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """See the base class."""
        del path, target
        present = present_module(fullname)
        if present is None:
            return None
        loader = _FormerLoader(present)
        return importlib.machinery.ModuleSpec(fullname, loader, origin=loader.origin)


def install() -> None:
    """Lets Python import modules under their former names. First, so that none is loaded twice."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, FormerNames())
