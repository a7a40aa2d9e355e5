"""Trains a student by several methods from the same checkpoint and prints one table.

    python examples/compare_methods.py --gin_file=gin_configs/arithmetic.gin \
      --metric=gsm8k_accuracy --model_dir=runs/methods --seeds=0,1,2 \
      --gin.EVAL_SPLIT="'test'" --gin.INITIAL_CHECKPOINT_PATH="'runs/arithmetic_sft_{seed}'"

Each method is a file of gin_configs/methods, given after the recipe. Every run is a separate
command, which is printed. `{seed}` in a binding is replaced by the run's seed. Finished runs are
skipped. SeqKD first generates the teacher's outputs. `--same_size_teacher` is the checkpoint of a
better student; without it the method of that name is left out. stored_teacher, which is another way
to run supervised KD, and cross_tokenizer, whose teacher has its own tokenizer, are left out by
default.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys

METHODS = pathlib.Path("gin_configs/methods")


def command(flags: argparse.Namespace, bindings: list[str], *files: str, seed: int) -> list[str]:
    """Returns the command line of one run."""
    return [
        *(sys.executable, "-m", "gkd_jax.main"),
        *(f"--gin_file={name}" for name in (*flags.gin_file, *files)),
        *(binding.replace("{seed}", str(seed)) for binding in bindings),
        f"--gin.SEED={seed}",
    ]


def run(arguments: list[str]) -> None:
    """Prints and runs a command; raises if it fails."""
    print("$ python", shlex.join(arguments[1:]), flush=True)
    subprocess.run(arguments, check=True)


def method_flags(flags: argparse.Namespace, method: str, *, seed: int) -> list[str]:
    """Returns the command line of a method; generates the teacher's outputs first for SeqKD."""
    files, bindings = [str(METHODS / f"{method}.gin")], list(flags.bindings)
    if method == "seqkd":
        files.insert(0, str(METHODS / "sft.gin"))
        output = pathlib.Path(flags.model_dir) / "teacher_outputs.jsonl"
        if not output.exists():
            writing = [*bindings, f"--gin.GENERATION_OUTPUT='{output}'"]
            # Required, but not used by this run mode.
            writing += [f"--gin.MODEL_DIR='{output.parent / 'none'}'", "--run_mode=generate"]
            run(command(flags, writing, "gin_configs/generate.gin", seed=seed))
        bindings.append(f"--gin.TEACHER_OUTPUTS='{output}'")
    if method == "same_size_teacher":
        bindings.append(f"--gin.TEACHER_CHECKPOINT_PATH='{flags.same_size_teacher}'")
    return command(flags, bindings, *files, seed=seed)


def rows(folder: pathlib.Path) -> list[dict[str, float]]:
    """Reads the metrics of a run; returns an empty list if it has not started."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def score(folder: pathlib.Path, metric: str) -> tuple[float, float, float] | None:
    """Returns first and last value of a metric and its standard error; None for unfinished runs."""
    scored = [row for row in rows(folder) if f"eval/{metric}" in row]
    if not any(folder.glob("checkpoint_*/MANIFEST.json")) or len(scored) < 2:
        return None
    first, last = scored[0], scored[-1]
    return first[f"eval/{metric}"], last[f"eval/{metric}"], last[f"eval/{metric}_se"]


def default_methods(flags: argparse.Namespace) -> list[str]:
    """Lists the methods that need only the recipe and these flags."""
    left_out = {"stored_teacher", "cross_tokenizer"}
    if not flags.same_size_teacher:
        left_out.add("same_size_teacher")
    return sorted({path.stem for path in METHODS.glob("*.gin")} - left_out)


def main() -> None:
    """Runs missing methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", action="append", required=True, help="gin file of the recipe")
    parser.add_argument("--metric", required=True, help="metric to compare, e.g. bleu")
    parser.add_argument("--model_dir", required=True, help="parent folder of the runs")
    parser.add_argument("--methods", help="comma-separated names; default: all")
    parser.add_argument("--seeds", default="0", help="comma-separated seeds")
    parser.add_argument(
        "--same_size_teacher", help="checkpoint of the teacher for the method same_size_teacher"
    )
    flags, flags.bindings = parser.parse_known_args()
    for binding in flags.bindings:
        if not binding.startswith("--gin."):
            parser.error(f"unknown argument {binding}; bindings are --gin.NAME=value")
    methods = flags.methods.split(",") if flags.methods else default_methods(flags)
    seeds = [int(seed) for seed in flags.seeds.split(",")]

    table: list[str] = []
    for method in methods:
        scores = []
        for seed in seeds:
            folder = pathlib.Path(flags.model_dir) / f"{method}_seed{seed}"
            if score(folder, flags.metric) is None:
                run([*method_flags(flags, method, seed=seed), f"--gin.MODEL_DIR='{folder}'"])
            found = score(folder, flags.metric)
            assert found is not None, f"{folder} has no score {flags.metric}"
            scores.append(found)
        cells = [f"{end:.2f} ({error:.2f})" for _, end, error in scores]
        gain = statistics.mean(end - start for start, end, _ in scores)
        table.append(f"| {method} | {' | '.join(cells)} | {gain:+.2f} |")
    print()
    print(f"| method | {' | '.join(f'seed {seed}' for seed in seeds)} | mean gain |")
    print(f"|---|{'---|' * len(seeds)}---|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
