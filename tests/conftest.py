"""Shared fixtures: one CPU with eight simulated devices, and data from outside if it is named."""

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # Most of a test's time is compilation, a third of which LLVM takes to make small programs fast.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

import jax
import pytest

# Helpers that several files of tests share: `import small_runs`.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

jax.config.update("jax_numpy_rank_promotion", "raise")
# What was compiled once is kept between tests and runs.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module")
def fully_compiled() -> Iterator[None]:
    """Compiles what a module runs as users do: for figures that the last digits matter to."""
    from jax._src import compiler

    def options(*args: Any, **kwargs: Any) -> Any:
        overrides = kwargs.get("env_options_overrides") or {}
        kwargs["env_options_overrides"] = {**overrides, "xla_backend_optimization_level": 3}
        return original(*args, **kwargs)

    original = compiler.get_compile_options
    compiler.get_compile_options = options
    yield
    compiler.get_compile_options = original


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Frees what a module has compiled.

    A program on a CPU maps a dozen pieces of memory, of which Linux gives a process 65,530: all
    tests in one process would use them up, and end in a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def external_data() -> pathlib.Path:
    """The folder that `GKD_JAX_DATA` names; the test is skipped where it names none."""
    folder = os.environ.get("GKD_JAX_DATA")
    if not folder:
        pytest.skip("GKD_JAX_DATA is not set: this test reads external data")
    path = pathlib.Path(folder)
    assert path.is_dir(), f"GKD_JAX_DATA names no folder: {folder}"
    return path


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> pathlib.Path:
    """A run of five steps of fine-tuning: the teacher of tiny runs, and what they start from."""
    import small_runs

    from gkd_jax.experiment import Student
    from gkd_jax.run_modes.train import train

    model_dir = tmp_path_factory.mktemp("tiny_teacher") / "run"
    student = Student(small_runs.model(small_runs.TEACHER_WIDTH))
    train(small_runs.sft(model_dir, student=student))
    return model_dir
