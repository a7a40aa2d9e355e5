"""The command line in processes of its own, which keep what they compile for one another."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
# In the folder that it runs in, and so of the same tree.
MAIN = ("-m", "tests.cached_main")
CACHE = ROOT / "tests" / ".jax_cache" / "processes"


def environment(*, devices: int, cache: pathlib.Path = CACHE) -> dict[str, str]:
    """Of a process with so many simulated devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    flags: Sequence[str],
    *,
    devices: int = 1,
    cache: pathlib.Path = CACHE,
    program: Sequence[str] = MAIN,
    **options: Any,
) -> subprocess.Popen:
    """Starts one.

    Args:
      flags: of the command.
      devices: simulated ones.
      cache: of what was compiled.
      program: what Python runs.
      **options: of `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, *program, *flags],
        cwd=ROOT,
        env=environment(devices=devices, cache=cache),
        text=True,
        **options,
    )


def group_flags(num_processes: int) -> list[list[str]]:
    """The flags of each process of a run over several on this machine."""
    if num_processes == 1:
        return [[]]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = [f"--coordinator_address=localhost:{port}", f"--process_count={num_processes}"]
    return [[*shared, f"--process_index={index}"] for index in range(num_processes)]
