"""Compares a training step from stored distributions with one that runs the teacher.

    python benchmarks/store.py --vocab_size=32000 --num_threads=1

For each way of storing a distribution it prints the packed bytes per token, the time to unpack a
batch, and the time of a step (with the transfer of the batch) relative to that of a step with the
teacher: the median of the ratio over alternating runs. All outputs have the full length. The
teacher is random and therefore uncertain: draws from it are almost all different, so that their
bytes are the maximum.
"""

import argparse
import os
import statistics
import time
from typing import Any

import jax
import numpy as np

from gkd_jax.common.array_types import Params
from gkd_jax.common.batch import Batch
from gkd_jax.distillation.optimizers import AdamW, Constant
from gkd_jax.distillation.stored_distributions import Draws, Full, Sparsification, TopK
from gkd_jax.distillation.train_state import TrainState, init_train_state
from gkd_jax.distillation.train_step import make_train_step
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives import ForwardKL, Objective
from gkd_jax.run_modes.store_teacher import make_choose


def make_model(args: argparse.Namespace, *, width: int, num_heads: int) -> T5:
    """Builds a T5 with the given width and number of heads."""
    return T5(
        T5Config(
            vocab_size=args.vocab_size,
            emb_dim=width,
            num_heads=num_heads,
            head_dim=width // num_heads,
            mlp_dim=8 * width // 3,
            num_encoder_layers=args.num_layers,
            num_decoder_layers=args.num_layers,
            dtype="float32",
        )
    )


def make_batch(args: argparse.Namespace) -> Batch:
    """Returns random prompts and outputs of full length."""
    rng = np.random.default_rng(0)
    inputs = (args.batch_size, args.input_length)
    targets = (args.batch_size, args.target_length)
    arrays: dict[str, Any] = {
        "inputs": rng.integers(0, args.vocab_size, inputs, dtype=np.int32),
        "inputs_mask": np.ones(inputs, bool),
        "targets": rng.integers(0, args.vocab_size, targets, dtype=np.int32),
        "loss_weights": np.ones(targets, np.float32),
        "example_id": np.arange(args.batch_size, dtype=np.int32),
    }
    return Batch(**arrays)


def stored(
    sparsification: Sparsification, teacher: T5, params: Params, batch: Batch
) -> tuple[Batch, float, float]:
    """Returns the batch with stored distributions, bytes per token, and seconds to unpack it."""
    chosen = jax.jit(make_choose(teacher, sparsification, 1.0))(params, batch, jax.random.key(0))
    chosen = jax.device_get(chosen)
    packing = sparsification.packing(teacher.vocab_size)
    blocks = [packing.pack(*(array[row] for array in chosen)) for row in range(len(chosen[0]))]
    num_rows, length = batch.targets.shape
    start = time.perf_counter()
    rows = packing.empty(num_rows, length, max(entries for _, entries in blocks))
    for row, (block, _) in enumerate(blocks):
        packing.unpack(block, length, rows, row)
    seconds = time.perf_counter() - start
    num_bytes = sum(len(block) for block, _ in blocks)
    return batch.replace(stored_teacher=rows), num_bytes / (num_rows * length), seconds


def main() -> None:
    """Prints one line per sparsification."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--input_length", type=int, default=64)
    parser.add_argument("--target_length", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--student_dim", type=int, default=128)
    parser.add_argument("--teacher_dim", type=int, default=384)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--num_draws", type=int, default=50)
    parser.add_argument("--num_threads", type=int, help="Number of cores to use; default: all.")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if args.num_threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.num_threads])
    print(f"{jax.devices()[0].device_kind}, {vars(args)}")

    student = make_model(args, width=args.student_dim, num_heads=4)
    teacher = make_model(args, width=args.teacher_dim, num_heads=6)
    optimizer = AdamW(Constant(1e-3)).build()
    teacher_params = teacher.init(jax.random.key(1))
    batch, objective = make_batch(args), Objective(ForwardKL())
    steps = {
        model: jax.jit(make_train_step(student, model, objective, optimizer), donate_argnums=0)
        for model in (teacher, None)
    }
    state = init_train_state(student.init(jax.random.key(0)), optimizer)

    def timed(state: TrainState, model: T5 | None, batch: Batch) -> tuple[TrainState, float]:
        start = time.perf_counter()
        params = None if model is None else teacher_params
        state, _ = steps[model](state, params, batch, jax.random.key(0))
        jax.block_until_ready(state)
        return state, time.perf_counter() - start

    for sparsification in (TopK(args.top_k), Draws(args.num_draws), Full(), Full("float16")):
        from_store, num_bytes, unpacking = stored(sparsification, teacher, teacher_params, batch)
        seconds: list[tuple[float, float]] = []
        for _ in range(args.repeats + 1):
            state, live = timed(state, teacher, batch)
            state, own = timed(state, None, from_store)
            seconds.append((live, own))
        ratio = statistics.median(own / live for live, own in seconds[1:])
        live = statistics.median(live for live, _ in seconds[1:])
        print(
            f"{sparsification}: {num_bytes:.1f} bytes per token, unpacked in "
            f"{1e3 * unpacking:.1f} ms; a step with the teacher {live:.2f} s, from the store "
            f"{ratio:.2f} of it",
            flush=True,
        )


if __name__ == "__main__":
    main()
