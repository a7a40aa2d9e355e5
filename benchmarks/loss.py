"""Compares the fused loss with the plain loss: time with gradients, and temporary memory.

    python benchmarks/loss.py --num_threads=1
    python benchmarks/loss.py --memory

The first command runs both forms in turns, for several sizes of the vocabulary (V), of the batch
(B*T) and of the models (D: widths of student and teacher), and then several chunk sizes. The second
runs nothing: it prints the compiler's memory estimates, so that sizes may exceed the machine.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import timing

from gkd_jax.common.array_types import Array
from gkd_jax.objectives import (
    GeneralizedJSD,
    Objective,
    Predictions,
    fused,
    fused_weighted_loss,
    weighted_loss,
)

FORMS: dict[str, Callable[..., Any]] = {"plain": weighted_loss, "fused": fused_weighted_loss}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one comparison. All positions have weight."""

    vocab_size: int = 32_128
    positions: int = 1024
    student_dim: int = 128
    teacher_dim: int = 384

    def arrays(self) -> Any:
        """Returns hidden states and output layers of both models, targets and weights."""
        shape = (8, self.positions // 8)
        keys = jax.random.split(jax.random.key(0), 5)

        def model(keys: Array, dim: int) -> Any:
            hidden = jax.random.normal(keys[0], (*shape, dim))
            return hidden, jax.random.normal(keys[1], (dim, self.vocab_size)) / dim**0.5

        targets = jax.random.randint(keys[4], shape, 0, self.vocab_size)
        weights = jnp.full(shape, 1.0 / self.positions)
        student, teacher = model(keys[:2], self.student_dim), model(keys[2:4], self.teacher_dim)
        return student, teacher, targets, weights

    def columns(self) -> tuple[str, ...]:
        """Returns the sizes as cells of a table."""
        dims = f"{self.student_dim}, {self.teacher_dim}"
        return f"{self.vocab_size:,}", f"{self.positions:,}", dims


TIMED = (
    Case(vocab_size=8_192),
    Case(),
    Case(vocab_size=131_072, positions=256),
    Case(vocab_size=262_144, positions=256),
    Case(positions=256),
    Case(positions=4096),
    Case(student_dim=512, teacher_dim=1024),
)
COMPILED = (
    Case(vocab_size=8_192, positions=4096),
    Case(positions=4096),
    Case(vocab_size=131_072, positions=4096),
    Case(vocab_size=262_144, positions=4096),
    Case(positions=1024),
    Case(positions=16_384),
    Case(positions=4096, student_dim=512, teacher_dim=1024),
)
QUICK = (Case(vocab_size=8_192, positions=256), Case(positions=256))
CURVE = tuple(1 << power for power in range(19, 25))


def unembed(kernel: Array, hidden: Array) -> Array:
    """Computes float32 logits from hidden states."""
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def compile_loss(form: Callable[..., Any], case: Case) -> Any:
    """Compiles a function from the arrays of a case to the loss and the student's gradients."""
    objective = Objective(GeneralizedJSD(0.5))

    def loss(student: Any, teacher: Any, targets: Array, weights: Array) -> Array:
        return form(
            objective,
            student=Predictions(*student, unembed),
            teacher=Predictions(*teacher, unembed),
            targets=targets,
            weights=weights,
        )[0]

    return jax.jit(jax.value_and_grad(loss)).lower(*jax.eval_shape(case.arrays)).compile()


def temporary_megabytes(compiled: Any) -> float:
    """Returns the compiler's estimate of temporary memory, in MB of 10^6 bytes."""
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def memory_table(cases: tuple[Case, ...]) -> str:
    """Compares the temporary memory of both forms."""
    rows = []
    for case in cases:
        plain, chunks = (temporary_megabytes(compile_loss(form, case)) for form in FORMS.values())
        head = 4 * case.student_dim * case.vocab_size / 1e6
        rows.append(
            (
                *case.columns(),
                f"{plain:.0f}",
                f"{chunks:.0f}",
                f"{head:.0f}",
                f"1/{plain / chunks:.0f}",
            )
        )
    header = (
        "V",
        "B*T",
        "D",
        "plain, MB",
        "fused, MB",
        "of which the output layer's gradient",
        "fused/plain",
    )
    return timing.table(header, rows)


def time_table(cases: tuple[Case, ...], *, num_threads: int, repeats: int) -> str:
    """Compares the times of both forms."""
    rows = []
    for case in cases:
        seconds = run(
            {name: compile_loss(form, case) for name, form in FORMS.items()},
            case,
            num_threads=num_threads,
            repeats=repeats,
        )
        ratio = seconds["fused"] / seconds["plain"]
        rows.append(
            (*case.columns(), f"{seconds['plain']:.3f}", f"{seconds['fused']:.3f}", f"{ratio:.2f}")
        )
    return timing.table(("V", "B*T", "D", "plain, s", "fused, s", "fused/plain"), rows)


def curve_table(case: Case, *, num_threads: int, repeats: int) -> str:
    """Compares several chunk sizes with the plain form."""
    compiled = {"plain": compile_loss(weighted_loss, case)}
    for entries in CURVE:
        with chunks_of(entries):
            compiled[f"{entries}"] = compile_loss(fused_weighted_loss, case)
    seconds = run(compiled, case, num_threads=num_threads, repeats=repeats)
    rows = []
    for entries in CURVE:
        with chunks_of(entries):
            size = fused.chunk_positions(case.vocab_size, case.positions, platform="cpu")
        rows.append(
            (
                f"{entries / 2**20:g}",
                size,
                f"{seconds[str(entries)] / seconds['plain']:.2f}",
                f"{temporary_megabytes(compiled[str(entries)]):.0f}",
                "<-" if entries == fused.CHUNK_ENTRIES else "",
            )
        )
    header = ("logits per chunk, 2^20", "positions", "fused/plain", "temporary MB", "default")
    return timing.table(header, rows)


def run(
    compiled: dict[str, Any], case: Case, *, num_threads: int, repeats: int
) -> dict[str, float]:
    """Times compiled functions in turns; returns seconds by name."""
    arrays = case.arrays()
    contestants = {
        name: lambda function=function: jax.block_until_ready(function(*arrays))
        for name, function in compiled.items()
    }
    times = timing.turns(contestants, repeats=repeats)
    return {name: time.seconds(num_threads) for name, time in times.items()}


@contextlib.contextmanager
def chunks_of(entries: int) -> Iterator[None]:
    """Sets the number of logits per chunk within a `with` block."""
    with mock.patch.object(fused, "CHUNK_ENTRIES", entries):
        yield


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_threads", type=int, help="Number of cores to use; default: all.")
    parser.add_argument("--memory", action="store_true", help="Compile only.")
    parser.add_argument("--quick", action="store_true", help="Small sizes, fewer repetitions.")
    args = parser.parse_args()
    num_threads = timing.keep_to_cores(args.num_threads)
    if args.memory:
        print(memory_table(QUICK if args.quick else COMPILED))
        return
    repeats = 3 if args.quick else 7
    options = dict(num_threads=num_threads, repeats=repeats)
    print(time_table(QUICK if args.quick else TIMED, **options), flush=True)
    print(f"\n{curve_table(QUICK[1] if args.quick else Case(), **options)}")


if __name__ == "__main__":
    main()
