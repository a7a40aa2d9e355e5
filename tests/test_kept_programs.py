"""What is compiled ahead is what a run asks for: JAX's cache keeps it, and the run finds it."""

import importlib.util
import os
import warnings

import jax
import pytest
import small_runs
from jax.experimental.compilation_cache import compilation_cache

from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.run_modes import compile_ahead, train
from gkd_jax.training import programs

OF_A_RUN = ("jit_train_step", "jit_roll_out", "jit_eval_step")


@pytest.fixture
def cache(tmp_path):
    """A cache of this test's alone, which keeps everything."""
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    folder = tmp_path / "cache"
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def kept(folder):
    return {name for name in os.listdir(folder) if name.startswith(OF_A_RUN)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{"data_parallelism": 1}, {"data_parallelism": 2, "rules": "fsdp"}]
)
def test_a_run_finds_what_was_compiled_ahead(shape, cache, tmp_path, tiny_teacher):
    partitioner = Partitioner(**shape)
    experiment = small_runs.gkd(
        tmp_path / "run", tiny_teacher, num_steps=6, partitioner=partitioner
    )
    arguments = programs.Arguments(experiment)
    for one in programs.functions_of(experiment, arguments):
        one.function.lower(*one.arguments).compile()
    ahead = kept(cache)
    assert {name.rpartition("-")[0].rpartition("-")[0] for name in ahead} == set(OF_A_RUN)
    jax.clear_caches()
    train.train(experiment)
    assert kept(cache) == ahead


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: it compiles for a TPU",
)
def test_programs_for_a_slice_are_kept(cache, tmp_path):
    experiment = small_runs.sft(tmp_path / "run", evaluation=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # The second finds one, and cannot read it without a TPU.
            compile_ahead.compile_for(experiment, "v5e:1x1", names=("train step",))
            assert len(kept(cache)) == 1
