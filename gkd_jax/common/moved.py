"""Tables of renamed modules, classes, settings and gin files, so that former names keep working.

Python imports, gin files, flags and the saved configurations of old runs may use a former name. The
first use of a former name gives a warning with the present name. Entries are never removed, since
the folders of old runs contain the former names.
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

# Maps the former name of a module to its present name, both relative to gkd_jax.
_MODULES = {
    "adapters": "experiment.checks.adapters",
    "appended": "common.growing_files",
    "array_types": "common.array_types",
    "batch": "common.batch",
    "checkpoints.leaves": "checkpoints.sharded_reads",
    "checkpoints.store": "checkpoints.manager",
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
    "gin_reader": "experiment.gin_files.parser",
    "gin_text": "experiment.gin_files.text",
    "gin_utils": "experiment.gin_files.configuration",
    "gin_walk": "experiment.gin_files.walk",
    "hf_checks": "experiment.checks.checkpoints",
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
    "models.combined": "models.ensembles",
    "models.config": "models.t5_config",
    "models.narrowed": "models.wrapper",
    "models.wrapped": "models.wrapper",
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

# Classes and functions that were renamed or moved to another module. Maps 'module.former name' to
# the present module and name. 'module' is the present name of the module that defined the class or
# function. If a package re-exported the class or function, a second entry with the name of the
# package is needed. Python imports of former names work from all packages. They work from a module
# only if it has a `__getattr__` that calls `load_moved`.
_NAMES = {
    "objectives.other_divergences.EntropyAware": "objectives.divergence_sums.EntropyAware",
    "objectives.other_divergences.WeightedSum": "objectives.divergence_sums.WeightedSum",
    "checkpoints.manager.CheckpointStore": "checkpoints.manager.CheckpointManager",
    "checkpoints.manager.save_params": "checkpoints.save.save_params",
    "common.growing_files.AppendedFile": "common.growing_files.GrowingFile",
    "data.batches.TrainIterator": "data.iterators.TrainIterator",
    "devices.partitioning.fetch_to_host": "devices.processes.fetch_to_host",
    "devices.partitioning.process_zero_decides": "devices.processes.process_zero_decides",
    "data.task.as_it_is": "data.task.unchanged",
    "data.task.get_task": "data.registry.get_task",
    "data.task.register_task": "data.registry.register_task",
    "distillation.stored_distributions.Support": (
        "distillation.stored_distributions.Sparsification"
    ),
    "data.teacher_store.TeacherStore": "data.teacher_store.StoreReader",
    "models.ensembles.CombinedModel": "models.ensembles.EnsembleModel",
    "models.wrapper.NarrowedModel": "models.wrapper.RestrictedVocabulary",
    "models.wrapper.WrappedModel": "models.wrapper.ModelWrapper",
    "models.wrapper.narrowed": "models.wrapper.restrict_vocabulary",
    "sampling.teacher_assisted.Policy": "sampling.teacher_assisted.TeacherAssistance",
}

# Maps 'module.owner.former parameter' to the present name of the parameter. The owner is a class or
# function; owner and module have their present names here. Subclasses inherit the entry.
_SETTINGS = {
    "distillation.rollout.Rollout.policy": "teacher_assistance",
    "experiment.settings.NonFinite.policy": "action",
    "experiment.settings.Storing.support": "sparsification",
}

# Macros of the gin files in gin_configs/.
_MACROS = {
    "NON_FINITE_POLICY": "NON_FINITE_ACTION",
    "STORE_SUPPORT": "STORE_SPARSIFICATION",
}

# Paths of gin files, as --gin_file and `include` give them.
_GIN_FILES = {
    "gin_configs/methods/self_distillation.gin": "gin_configs/methods/same_size_teacher.gin",
}

# Names under which the gin files in gin_configs/ used to import modules. These gin files now import
# only the packages, which re-export the contents of the modules. Flags and users' gin files are
# read after these gin files and could use the names that they imported, so they may still do so.
_GIN_ALIASES = {
    "beam_search": "sampling.beam_search",
    "config": "models.t5_config",
    "decoder_config": "models.decoder_config",
    "decoder_only": "models.decoder_only",
    "divergences": "objectives.divergences",
    "lora": "models.lora",
    "methods": "sampling.methods",
    "mixing": "objectives.mixing",
    "objective": "objectives.objective",
    "other_divergences": "objectives.other_divergences",
    "pipeline": "data.pipeline",
    "policies": "sampling.teacher_assisted",
    "supports": "distillation.stored_distributions",
    "t5": "models.t5",
    "text_metrics": "data.metrics.text_metrics",
}


def present_module(name: str) -> str | None:
    """Returns the present full name of a module, or None if `name` is not a former one."""
    inner = _MODULES.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) else None
    return None if inner is None else _PACKAGE + inner


def former_modules(name: str) -> list[str]:
    """Lists the former full names of a module."""
    inner = name.removeprefix(_PACKAGE)
    return [_PACKAGE + former for former, present in _MODULES.items() if present == inner]


def present_name(module: str, name: str) -> tuple[str, str] | None:
    """Returns the present module and name of a class or function that `module` used to define.

    Returns None if `name` is not a former name in `module`.
    """
    found = _NAMES.get(f"{module.removeprefix(_PACKAGE)}.{name}")
    if found is None or not module.startswith(_PACKAGE):
        return None
    home, _, present = found.rpartition(".")
    return _PACKAGE + home, present


def former_names(module: str, name: str) -> list[str]:
    """Lists the former full names of a class or function, under every former name of its module."""
    inner = f"{module}.{name}".removeprefix(_PACKAGE)
    names = [f"{former}.{name}" for former in former_modules(module)]
    for former, present in _NAMES.items():
        if present == inner:
            home, _, former_name = former.rpartition(".")
            homes = [_PACKAGE + home, *former_modules(_PACKAGE + home)]
            names += [f"{home}.{former_name}" for home in homes]
    return names


def present_setting(function: Any, name: str) -> str | None:
    """Returns the present name of a parameter of a function; None if `name` is not a former one."""
    for kind in getattr(function, "__mro__", (function,)):
        home = getattr(kind, "__module__", None) or ""
        owner = f"{home}.{getattr(kind, '__qualname__', '')}"
        if owner.startswith(_PACKAGE):
            found = _SETTINGS.get(f"{owner.removeprefix(_PACKAGE)}.{name}")
            if found is not None:
                return found
    return None


def present_macro(name: str) -> str | None:
    """Returns the present name of a macro, or None if `name` is not a former one."""
    return _MACROS.get(name)


def present_gin_file(path: str) -> str | None:
    """Returns the present path of a gin file, or None if `path` is not a former one."""
    for former, present in _GIN_FILES.items():
        if f"/{path}".endswith(f"/{former}"):
            return path.removesuffix(former) + present
    return None


def gin_alias(name: str) -> str | None:
    """Returns the full name of the module that gin files used to import as `name`, or None."""
    inner = _GIN_ALIASES.get(name)
    return None if inner is None else _PACKAGE + inner


def load_moved(module: str, name: str) -> Any:
    """Returns the class or function that `module` used to define as `name`, and gives a warning.

    Modules call this function from their `__getattr__`.

    Args:
      module: `__name__` of the module.
      name: the attribute that was requested.

    Raises:
      AttributeError: the module never defined a class or function of this name.
    """
    found = present_name(module, name)
    if found is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, present = found
    message = f"{module}.{name} is now {home}.{present}. Import it from there."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(home), present)


class _FormerLoader(importlib.abc.InspectLoader):
    """Loads a module under its former name: returns the present module, not a second copy."""

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
        # The import system has replaced the spec by one with the former name: restore it.
        module.__spec__ = self._spec

    def get_source(self, fullname: str) -> str | None:
        del fullname
        loader: Any = self._present_spec().loader
        return loader.get_source(self._present)

    def get_code(self, fullname: str) -> types.CodeType | None:
        """Returns the code of the module, which `python -m` with a former name needs."""
        del fullname
        loader: Any = self._present_spec().loader
        return loader.get_code(self._present)

    @property
    def origin(self) -> str | None:
        """Path of the module's file."""
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
        del path, target
        present = present_module(fullname)
        if present is None:
            return None
        loader = _FormerLoader(present)
        return importlib.machinery.ModuleSpec(fullname, loader, origin=loader.origin)


def install() -> None:
    """Installs the import hook for former names.

    The hook comes before all other finders, so that no module is loaded twice.
    """
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, FormerNames())
