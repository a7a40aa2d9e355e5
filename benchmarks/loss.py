"""Compares the loss in chunks with its plain form: time with gradients, and peak temporary memory.

    python benchmarks/loss.py --vocab_sizes=32128,131072 --num_threads=1

One line a vocabulary: bytes from the compiler's account, the head's gradient among them, and the
median over alternating runs of the ratio of times. With `--memory_only` nothing is run, so that
sizes may exceed the machine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.array_types import Array
from gkd_jax.objectives import (
    GeneralizedJSD,
    Objective,
    Predictions,
    fused_weighted_loss,
    weighted_loss,
)

FORMS = {"plain": weighted_loss, "fused": fused_weighted_loss}


def unembed(kernel: Array, hidden: Array) -> Array:
    """Hidden states to float32 logits."""
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def make_loss(form: Callable[..., Any]) -> Callable[..., Any]:
    """A function of all arrays to the loss and the gradients of the student's."""
    objective = Objective(GeneralizedJSD(0.5))

    def loss(student: Any, teacher: Any, targets: Array, weights: Array) -> Array:
        return form(
            objective,
            student=Predictions(*student, unembed),
            teacher=Predictions(*teacher, unembed),
            targets=targets,
            weights=weights,
        )[0]

    return jax.jit(jax.value_and_grad(loss))


def make_arrays(args: argparse.Namespace, vocab_size: int) -> Any:
    """Hidden states and heads of both models, targets and weights; all positions count."""
    shape = (args.batch_size, args.target_length)
    keys = jax.random.split(jax.random.key(0), 5)

    def model(keys: Array, dim: int) -> Any:
        hidden = jax.random.normal(keys[0], (*shape, dim))
        return hidden, jax.random.normal(keys[1], (dim, vocab_size)) / dim**0.5

    targets = jax.random.randint(keys[4], shape, 0, vocab_size)
    weights = jnp.full(shape, 1.0 / (shape[0] * shape[1]))
    return model(keys[:2], args.student_dim), model(keys[2:4], args.teacher_dim), targets, weights


def median_ratio(compiled: dict[str, Any], arrays: Any, repeats: int) -> tuple[float, float]:
    """Median seconds of the plain form, and median of fused over plain in alternating runs."""
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats + 1):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            seconds[name].append(time.perf_counter() - start)
    plain, fused = (seconds[name][1:] for name in ("plain", "fused"))
    ratios = [one / other for one, other in zip(fused, plain, strict=True)]
    return statistics.median(plain), statistics.median(ratios)


def main() -> None:
    """Prints one line a vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--target_length", type=int, default=128)
    parser.add_argument("--student_dim", type=int, default=128)
    parser.add_argument("--teacher_dim", type=int, default=384)
    parser.add_argument("--vocab_sizes", default="32128")
    parser.add_argument("--num_threads", type=int, help="Cores to keep to; all by default.")
    parser.add_argument("--memory_only", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.num_threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.num_threads])
    print(f"{jax.devices()[0].device_kind}, {vars(args)}")
    for vocab_size in map(int, args.vocab_sizes.split(",")):
        shapes = jax.eval_shape(lambda v=vocab_size: make_arrays(args, v))
        compiled = {name: make_loss(form).lower(*shapes).compile() for name, form in FORMS.items()}
        memory = {
            name: one.memory_analysis().temp_size_in_bytes / 2**20 for name, one in compiled.items()
        }
        head = 4 * args.student_dim * vocab_size / 2**20
        line = (
            f"V {vocab_size}: plain {memory['plain']:6.0f} MiB, fused {memory['fused']:4.0f} MiB "
            f"with the head's gradient ({head:.0f}), 1/{memory['plain'] / memory['fused']:.0f}"
        )
        if not args.memory_only:
            plain, ratio = median_ratio(compiled, make_arrays(args, vocab_size), args.repeats)
            line += f"; plain {plain:.2f} s, fused {ratio:.2f} of it"
        print(line, flush=True)


if __name__ == "__main__":
    main()
