"""Measures loading a Hugging Face checkpoint onto a mesh: memory beyond the model's, and speed.

    python benchmarks/loading.py

It writes a Llama with random bfloat16 weights (1 GB) to a temporary folder and loads it in another
process onto eight simulated devices, in bfloat16 and in float32. Memory is the anonymous memory of
that process, which excludes the pages of mapped files. Time is relative to reading the file once
from the page cache.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

import timing


def write_checkpoint(folder: pathlib.Path) -> int:
    """Writes a Llama of half a billion parameters; returns the bytes of its weights."""
    import jax
    import ml_dtypes
    import numpy as np
    from etils import epath

    from gkd_jax.checkpoints.hf import write_hf_checkpoint
    from gkd_jax.models.decoder_config import DecoderConfig
    from gkd_jax.models.decoder_only import DecoderOnly

    config = DecoderConfig(
        vocab_size=32000, emb_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128,
        mlp_dim=5504, layer_kinds=("full",) * 7, tie_embeddings=True,
    )  # fmt: skip
    model = DecoderOnly(config)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: generator.standard_normal(leaf.shape, np.float32).astype(ml_dtypes.bfloat16),
        model.abstract_params(),
    )
    write_hf_checkpoint(epath.Path(folder), model, params)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def anonymous_mb() -> float:
    """Returns the current anonymous memory of this process, in MB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s*(\d+) kB", status)[0]) * 1024 / 1e6


def load(folder: str, dtype: str) -> None:
    """Loads; prints the model's size, memory growth at the peak and at the end, MB, and seconds."""
    import jax
    import jax.numpy as jnp

    from gkd_jax.checkpoints import hf
    from gkd_jax.checkpoints.load import load_params
    from gkd_jax.devices.partitioning import Partitioner

    model = hf.hf_model(folder)
    shardings = Partitioner(model_parallelism=2, rules="fsdp").param_shardings(model)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype(dtype), sharding=sharding
        ),
        model.abstract_params(), shardings,
    )  # fmt: skip
    jnp.zeros(1).block_until_ready()
    before, peak, is_done = anonymous_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.01):
            peak = max(peak, anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    params = jax.block_until_ready(load_params(folder, abstract))
    seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
    print(f"{size:.0f} {peak - before:.0f} {anonymous_mb() - before:.0f} {seconds:.2f}")


def main() -> None:
    """Prints the table; with --load, one row of numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "DTYPE"))
    args = parser.parse_args()
    if args.load:
        load(*args.load)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        size = write_checkpoint(folder)
        start = time.perf_counter()
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass
        reading = time.perf_counter() - start
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(timing.ROOT),
        }
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, __file__, "--load", str(folder), dtype]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            model, peak, end, seconds = map(float, done.stdout.split())
            rows.append(
                (
                    dtype, f"{size / 1e6:.0f}", f"{model:.0f}", f"{peak:.0f}",
                    f"{peak / model:.2f}", f"{end / model:.2f}", f"{seconds:.2f}",
                    f"{seconds / reading:.1f}",
                )
            )  # fmt: skip
    header = (
        "dtype", "file, MB", "model, MB", "growth at the peak, MB", "relative to the model",
        "at the end, relative to the model", "s", "relative to reading the file",
    )  # fmt: skip
    print(timing.table(header, rows))


if __name__ == "__main__":
    main()
