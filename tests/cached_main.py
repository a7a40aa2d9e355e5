"""`python -m gkd_jax.main`, each process of which keeps what it compiled.

JAX lets the first process alone write its cache, so that the others compile at every start, which
is most of a small run's time. Here each writes one of its own, under JAX_COMPILATION_CACHE_DIR.
"""

import os
import sys
from typing import Any

import jax
from jax._src import compiler, distributed

from gkd_jax import main

original = compiler._cache_write


def write(*args: Any, **kwargs: Any) -> None:
    number = distributed.global_state.process_id
    distributed.global_state.process_id = 0
    try:
        original(*args, **kwargs)
    finally:
        distributed.global_state.process_id = number


if __name__ == "__main__":
    compiler._cache_write = write
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    names = [flag for flag in sys.argv if flag.startswith("--process_index=")]
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, *names))
    main.run()
