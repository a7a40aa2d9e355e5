"""Shared fixtures: one CPU with eight simulated devices, and data from outside if it is named."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def external_data() -> pathlib.Path:
    """The folder that `GKD_JAX_DATA` names; the test is skipped where it names none."""
    folder = os.environ.get("GKD_JAX_DATA")
    if not folder:
        pytest.skip("GKD_JAX_DATA is not set: this test reads external data")
    path = pathlib.Path(folder)
    assert path.is_dir(), f"GKD_JAX_DATA names no folder: {folder}"
    return path
