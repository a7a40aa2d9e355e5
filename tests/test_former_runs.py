"""Folders of runs that earlier versions wrote go on, and gin files and imports of then still work.

`tests/fixtures/run_8966c5e` was made at commit 8966c5e, before the package was laid out in rooms,
by the command that `config.gin` in each folder notes: runs of 12 steps, cut off after step 8. `gkd`
learns from the run `teacher`, half of its steps on its own outputs; `average` replays outputs,
learns from its own average, and skips steps that are not finite. `expected.npz` holds the arrays
that both ended with there, `machine.txt` the machine on which they are the same to the bit.
"""

import importlib
import inspect
import json
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
import test_kill_and_resume as kills

from gkd_jax.common import moved
from gkd_jax.experiment import Experiment
from gkd_jax.experiment.gin_files import configuration, names
from gkd_jax.run_modes.study import Study

ROOT = pathlib.Path(__file__).parent.parent
FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "run_8966c5e"
NUM_STEPS = 12
LEARNING_RATE = 1e-3
RUNS = ("gkd", "average")


def machine() -> str:
    """What decides the last digits of a result: the processor and the compiler."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    kept = {line for line in lines if line.startswith(("model name", "cpu family", "flags"))}
    cores = os.cpu_count()
    return "; ".join([*sorted(kept), f"{cores} cores", platform.machine(), jax.__version__])


def command_of(folder: pathlib.Path) -> list[str]:
    """The arguments that a run was started with, as its configuration notes them."""
    line = (folder / "config.gin").read_text().splitlines()[1]
    return shlex.split(line.removeprefix("# python -m gkd_jax.main "))


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_8966c5e_goes_on(run, tmp_path):
    """By the very command of then; to the very bits on the machine where the fixture was made."""
    if sys.platform != "linux":
        pytest.skip("the fixture was made on Linux")
    for name in ("teacher", run):
        shutil.copytree(FIXTURE / name, tmp_path / name)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    result = subprocess.run(
        [sys.executable, "-m", "gkd_jax.main", *command_of(tmp_path / run)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "resuming after step 8" in result.stderr
    ended = flat(kills.all_arrays(tmp_path / run / f"checkpoint_{NUM_STEPS}"))
    with np.load(FIXTURE / "expected.npz") as expected:
        wanted = {
            name.partition("/")[2]: expected[name] for name in expected if name.startswith(run)
        }
    assert set(ended) == set(wanted)
    is_same_machine = machine() == (FIXTURE / "machine.txt").read_text().strip()
    for name, array in wanted.items():
        if is_same_machine:
            assert ended[name].tobytes() == array.tobytes(), name
        elif name.startswith("params/"):
            bound = 0.02 * NUM_STEPS * LEARNING_RATE
            np.testing.assert_allclose(ended[name], array, atol=bound, err_msg=name)


def test_a_saved_configuration_of_8966c5e_is_the_present_one(monkeypatch):
    """Under the names of now: gin files of then and of now give the same settings."""
    monkeypatch.chdir(FIXTURE)
    for run in RUNS:
        text = (FIXTURE / run / "config.gin").read_text()
        assert "from gkd_jax import partitioning" in text
        saved = configuration.parse_text(text, roots=(Study, Experiment), name="config.gin")
        assert "from gkd_jax.devices import partitioning" in saved.text
        configuration.check_config(run, saved)


def test_a_former_import_in_a_gin_file_is_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    names.warn_once.cache_clear()
    path = tmp_path / "mine.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from gkd_jax import experiment\n"
        "from gkd_jax import teachers\n"
        "from gkd_jax.models import config\n"
        "include 'gin_configs/arithmetic.gin'\n"
        "MODEL_DIR = 'none'\nINITIAL_CHECKPOINT_PATH = None\n"
        "student/config.T5Config.emb_dim = 32\n"
        "experiment.Experiment.teacher = @teachers.LiveStudent()\n"
    )
    with caplog.at_level("WARNING"):
        config = configuration.parse(roots=(Experiment,), gin_files=[str(path), str(path)])
    told = [record.message for record in caplog.records if "is now" in record.message]
    assert told == [
        "gkd_jax.teachers is now gkd_jax.distillation.teachers. Import that in gin files.",
        "gkd_jax.models.config is now gkd_jax.models.t5_config. Import that in gin files.",
    ]
    assert "emb_dim = 32" in config.text


@pytest.mark.parametrize(
    "binding",
    [
        "DIVERGENCE = @divergences.ForwardKL()",
        "student/config.T5Config.emb_dim = 32",
        "objective.Objective.student_temperature = 2.0",
        "train/pipeline.DatasetConfig.seed = 3",
        "gkd_jax.optimizers.Cosine.learning_rate = 1e-2",
        "gkd_jax.teachers.Teacher.weights = 'int8'",
    ],
)
def test_flags_of_before_the_rooms_still_work(binding, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["MODEL_DIR = 'none'", "INITIAL_CHECKPOINT_PATH = None", "BETA = 0.5"]
    if "ForwardKL" in binding:
        given.pop()
    configuration.parse(
        roots=(Experiment,),
        gin_files=["gin_configs/arithmetic.gin"],
        bindings=[*given, binding],
    )


@pytest.mark.parametrize(
    "bindings",
    [
        ["STORE_SUPPORT = @supports.Draws()"],
        # As saved configurations write the defaults of what a macro names.
        ["STORE_SUPPORT/supports.TopK.k = 8"],
        ["STORE_SUPPORT = @STORE_SUPPORT/supports.TopK()", "STORE_SUPPORT/supports.TopK.k = 8"],
    ],
)
def test_former_names_of_a_store_still_work(bindings, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["MODEL_DIR = 'none'", "INITIAL_CHECKPOINT_PATH = None", "STORE_PATH = 'none'"]
    config = configuration.parse(
        roots=(Experiment,),
        gin_files=["gin_configs/arithmetic.gin", "gin_configs/store_teacher.gin"],
        bindings=[*given, *bindings],
    )
    wanted = "Draws" if "Draws" in bindings[0] else "TopK.k = 8"
    assert f"stored_distributions.{wanted}" in config.text


def test_dotted_imports_of_former_modules(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "mine.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "import gkd_jax.experiment\nimport gkd_jax.teachers\nimport gkd_jax.models.config\n"
        "include 'gin_configs/arithmetic.gin'\n"
        "MODEL_DIR = 'none'\nINITIAL_CHECKPOINT_PATH = None\n"
        "student/gkd_jax.models.config.T5Config.emb_dim = 32\n"
        "gkd_jax.experiment.Experiment.teacher = @gkd_jax.teachers.LiveStudent()\n"
    )
    text = configuration.parse(roots=(Experiment,), gin_files=[str(path)]).text
    assert "emb_dim = 32" in text
    assert "teachers.LiveStudent()" in text


def test_a_former_gin_file_is_found_on_a_search_path(monkeypatch):
    monkeypatch.chdir(ROOT)
    configuration.parse(
        roots=(Experiment,),
        gin_files=["arithmetic.gin", "methods/self_distillation.gin"],
        bindings=[
            *("MODEL_DIR = 'none'", "INITIAL_CHECKPOINT_PATH = None"),
            "TEACHER_CHECKPOINT_PATH = 'none'",
        ],
        search_paths=["gin_configs"],
    )


def test_a_former_name_in_a_flag_is_told(monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    names.warn_once.cache_clear()
    with caplog.at_level("WARNING"):
        configuration.parse(
            roots=(Experiment,),
            gin_files=["gin_configs/arithmetic.gin"],
            bindings=[
                *("MODEL_DIR = 'none'", "INITIAL_CHECKPOINT_PATH = None"),
                "gkd_jax.partitioning.Partitioner.model_parallelism = 1",
                "partitioning.Partitioner.model_parallelism = 1",
            ],
        )
    told = [record.message for record in caplog.records if "is now" in record.message]
    assert told == [
        "gkd_jax.partitioning.Partitioner is now gkd_jax.devices.partitioning.Partitioner. "
        "Use that in flags."
    ]


def test_renamed_settings_and_macros_are_told_once(monkeypatch, caplog):
    """In files, flags and saved configurations; the settings are those of the present names."""
    monkeypatch.chdir(ROOT)
    names.warn_once.cache_clear()
    given = ["MODEL_DIR = 'none'", "INITIAL_CHECKPOINT_PATH = None"]

    def parsed(*bindings):
        return configuration.parse(
            roots=(Experiment,),
            gin_files=["gin_configs/arithmetic.gin"],
            bindings=[*given, *bindings],
        )

    with caplog.at_level("WARNING"):
        former = [
            parsed("NON_FINITE_POLICY = 'skip'"),
            parsed("NonFinite.policy = 'skip'"),
            parsed(
                "experiment.NonFinite.policy = %NON_FINITE_POLICY", "NON_FINITE_POLICY = 'skip'"
            ),
        ]
        present = parsed("NON_FINITE_ACTION = 'skip'")
        text = present.text.replace("NON_FINITE_ACTION", "NON_FINITE_POLICY")
        text = text.replace("NonFinite.action", "NonFinite.policy")
        text = text.replace("Rollout.teacher_assistance", "Rollout.policy")
        former.append(configuration.parse_text(text, roots=(Experiment,), name="config.gin"))
    assert [config.settings == present.settings for config in former] == [True] * 4
    assert former[-1].build() == present.build()
    told = [record.message for record in caplog.records if "is now" in record.message]
    assert told == [
        "the macro NON_FINITE_POLICY is now NON_FINITE_ACTION. Use that in gin files and flags.",
        "experiment.NonFinite.policy is now experiment.NonFinite.action. Use that in gin files.",
        "rollout.Rollout.policy is now rollout.Rollout.teacher_assistance. Use that in gin files.",
    ]


def test_a_renamed_class_is_told_once_in_gin_and_python(monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    names.warn_once.cache_clear()
    renamed = {
        "objectives.ForwardDivergence": "objectives.ForwardKL",
        "distillation.teachers.Tutor": "distillation.teachers.LiveStudent",
    }
    monkeypatch.setattr(moved, "_NAMES", renamed)
    with caplog.at_level("WARNING"):
        config = configuration.parse(
            roots=(Experiment,),
            gin_files=["gin_configs/gsm8k.gin", "gin_configs/methods/ema_teacher.gin"],
            bindings=[
                *("MODEL_DIR = 'none'", "INITIAL_CHECKPOINT_PATH = None"),
                "VOCABULARY_PATH = 'none'",
                "DIVERGENCE = @objectives.ForwardDivergence()",
                "experiment.Experiment.teacher = @teachers.Tutor()",
            ],
        )
    assert "DIVERGENCE = @objectives.ForwardKL()" in config.text
    assert ".LiveStudent()" in config.text
    told = [record.message for record in caplog.records if "is now" in record.message]
    assert told == [
        "gkd_jax.objectives.ForwardDivergence is now gkd_jax.objectives.ForwardKL. Use that in gin "
        "files.",
        "gkd_jax.distillation.teachers.Tutor is now gkd_jax.distillation.teachers.LiveStudent. Use "
        "that in gin files.",
    ]
    with pytest.warns(DeprecationWarning, match="is now gkd_jax.objectives.ForwardKL"):
        from gkd_jax.objectives import ForwardDivergence
    assert ForwardDivergence.__name__ == "ForwardKL"


def test_a_renamed_gin_file_is_found_by_its_former_path(monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    names.warn_once.cache_clear()
    bindings = ["MODEL_DIR = 'none'", "INITIAL_CHECKPOINT_PATH = None"]
    with caplog.at_level("WARNING"):
        texts = [
            configuration.parse(
                roots=(Experiment,),
                gin_files=["gin_configs/arithmetic.gin", f"gin_configs/methods/{name}.gin"],
                bindings=bindings,
            ).text
            for name in ("self_distillation", "same_size_teacher")
        ]
    assert texts[0] == texts[1]
    assert any("is now gin_configs/methods/same_size" in r.message for r in caplog.records)


def test_python_imports_under_former_names_give_the_same_module():
    for former in ("gkd_jax.batch", "gkd_jax.metrics.gsm8k", "gkd_jax.train", "gkd_jax.hub"):
        present = moved.present_module(former)
        program = (
            f"import importlib, warnings\nwarnings.simplefilter('error')\n"
            f"try:\n    importlib.import_module({former!r})\n"
            "except DeprecationWarning as warning:\n    print(warning)\n"
            "warnings.simplefilter('ignore')\n"
            f"one, other = map(importlib.import_module, ({former!r}, {present!r}))\n"
            "print(one is other, one.__spec__.name)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
        )
        assert result.stderr == ""
        told, same = result.stdout.splitlines()
        assert f"is now {present}" in told or "is now gkd_jax.data.metrics" in told
        assert same == f"True {present}"


def test_every_former_module_has_a_present_one():
    for former in moved._MODULES:
        present = moved.present_module(f"gkd_jax.{former}")
        path = ROOT / present.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), former
        old = ROOT / "gkd_jax" / former.replace(".", "/")
        assert not old.with_suffix(".py").exists(), former


def _present(name: str):
    """Imports what a present name of a table stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"gkd_jax.{module}"), attribute)


def test_every_former_name_has_a_present_one():
    for former, present in moved._NAMES.items():
        assert callable(_present(present)), former
        name = former.rpartition(".")[2]
        with pytest.warns(DeprecationWarning, match=name):
            assert _present(former) is _present(present), former
    for former, parameter in moved._SETTINGS.items():
        owner, _, name = former.rpartition(".")
        parameters = inspect.signature(_present(owner)).parameters
        assert parameter in parameters, former
        assert name not in parameters, former
    gin_text = "".join(path.read_text() for path in (ROOT / "gin_configs").rglob("*.gin"))
    for former, present in moved._MACROS.items():
        assert f"\n{present} = " in gin_text, former
        assert former not in gin_text
    for former, present in moved._GIN_FILES.items():
        assert (ROOT / present).exists(), former
        assert not (ROOT / former).exists(), former
    for alias in moved._GIN_ALIASES:
        importlib.import_module(moved.gin_alias(alias))


def test_a_task_is_registered_by_the_former_name():
    from gkd_jax.data import registry, task

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert task.register_task is registry.register_task
    assert "gkd_jax.data.registry.register_task" in str(told[0].message)
    with pytest.raises(AttributeError):
        _ = task.anything


def test_checkpoints_are_saved_under_their_former_names():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        from gkd_jax.checkpoints.store import CheckpointStore, save_params

        from gkd_jax.checkpoints import manager, save
    assert CheckpointStore is manager.CheckpointManager
    assert save_params is save.save_params
    messages = " ".join(str(one.message) for one in told)
    assert "gkd_jax.checkpoints.manager.CheckpointManager" in messages
    assert "gkd_jax.checkpoints.save.save_params" in messages


def test_last_step_runs_with_bare_python(tmp_path):
    """Launchers ask it on machines where nothing is installed; by both of its names."""
    for module in ("gkd_jax.last_step", "gkd_jax.checkpoints.last_step"):
        result = subprocess.run(
            [sys.executable, "-S", "-I", "-c",
             f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); "
             f"sys.argv = ['last_step', {str(FIXTURE / 'gkd')!r}]; "
             f"runpy.run_module({module!r}, run_name='__main__')"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == {"last_step": 8, "train_steps": 12, "done": False}
