"""Compiles the shipped recipes for TPU slices, without a TPU, and writes docs/results/scaling.md.

    python benchmarks/scaling.py             compiles missing results and writes the tables
    python benchmarks/scaling.py --only=wmt  only recipes whose name contains this text
    python benchmarks/scaling.py --scaling   only the tables of one recipe on several slices
    python benchmarks/scaling.py --render    writes the tables of existing results

It needs libtpu (pip install libtpu) but no TPU. Each cell is a recipe on a slice; it is compiled in
a process of its own, which takes minutes. Results are stored in docs/results/scaling.json, so that
the script can be stopped and restarted. A cell whose settings have changed is compiled again; after
a change of the code, delete that file. The tables replace the text between the two marks in
docs/results/scaling.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "scaling.json"
DOCUMENT = ROOT / "docs" / "results" / "scaling.md"
MARKS = ("<!-- made by benchmarks/scaling.py -->", "<!-- end -->")
sys.path.insert(0, str(ROOT))

# Required settings. No file at these paths is read.
PATHS = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TEACHER_CHECKPOINT_PATH")
LARGE = {"SCAN_LAYERS": True, "PARTITIONING_RULES": "fsdp"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A shipped gin file with settings.

    Attributes:
      name: name in the tables.
      file: path of the gin file.
      settings: values of macros, given in addition.
      chip: generation of the TPU chips.
    """

    name: str
    file: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    chip: str = "v5e"


def of_t5(task: str, size: str, **settings: Any) -> Recipe:
    """Returns a recipe of the GKD paper with T5 XL as the teacher."""
    settings = LARGE | {"STUDENT": f"t5_1_1-{size}", "VOCABULARY_PATH": "none"} | settings
    return Recipe(f"{task}, XL to {size}", f"gin_configs/{task}.gin", settings)


QWEN = Recipe("gsm8k_qwen3, 8B to 1.7B", "gin_configs/gsm8k_qwen3.gin")
SIZES = ("small", "base", "large")
# For long prompts only the activations between the student's layers are kept.
FULL = {"REMAT_POLICY": "full"}
RECIPES = (
    *(of_t5("wmt_ende", size) for size in SIZES),
    *(of_t5(task, size, **FULL) for task in ("xsum", "gsm8k") for size in SIZES),
    of_t5("flan2021", "base", NUM_MICROBATCHES=4, **FULL),
    QWEN,
    Recipe("gsm8k_llama3, 70B to 8B", "gin_configs/gsm8k_llama3.gin", chip="v5p"),
)
# Weak scaling: the same number of rows per chip on each slice.
WEAK = of_t5("wmt_ende", "small")
WEAK_SLICES = {"v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}
ROWS_PER_CHIP = 8
# One slice, and two slices of half its size.
SLICES = ("v5e:4x8", "v5e:4x4*2")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recipe on a slice.

    Attributes:
      recipe: recipe to compile.
      topology: slice to compile for.
      names: names of the compiled parts. The divergence of an evaluation is left out: it is a step
        without gradients, and needs less.
    """

    recipe: Recipe
    topology: str
    names: tuple[str, ...] = ("train step", "rollout", "evaluation")

    @property
    def key(self) -> str:
        """Identifies a result by everything that it depends on except the code."""
        settings = json.dumps(self.recipe.settings, sort_keys=True)
        return f"{self.recipe.file} {settings} {self.topology} {', '.join(self.names)}"


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    """Returns the recipe with additional settings."""
    return dataclasses.replace(recipe, settings=recipe.settings | settings)


def weak_cells(rules: str) -> Iterator[Cell]:
    """Yields the same recipe on increasing numbers of chips, with given sharding rules."""
    for topology, number in WEAK_SLICES.items():
        settings = {"BATCH_SIZE": ROWS_PER_CHIP * number, "PARTITIONING_RULES": rules}
        recipe = with_settings(WEAK, **settings)
        yield Cell(recipe, topology, ("train step",))


def slice_cells() -> Iterator[Cell]:
    """Yields the same number of chips as one slice and as two."""
    for topology in SLICES:
        yield Cell(with_settings(QWEN, BATCH_SIZE=64), topology, ("train step",))


class Results:
    """The results of compiled cells, stored in a file."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def report(self, cell: Cell) -> Any:
        """Returns the report on a cell, or None if it has not been compiled."""
        from gkd_jax.devices import hlo
        from gkd_jax.run_modes.compile_report import Part, Report

        found = self._found.get(cell.key)
        if found is None:
            return None
        parts = [Part(**{**part, "cost": hlo.Cost(**part["cost"])}) for part in found["parts"]]
        return Report(**{**found, "parts": parts})

    def compile(self, cell: Cell) -> Any:
        """Compiles a cell unless it has a result; returns its report."""
        if cell.key not in self._found:
            print(f"{cell.recipe.name} on {cell.topology}", flush=True)
            request = json.dumps(
                [cell.recipe.file, cell.recipe.settings, cell.topology, cell.names]
            )
            command = [sys.executable, __file__, f"--cell={request}"]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            self._found[cell.key] = json.loads(done.stdout.splitlines()[-1])
            self._path.write_text(json.dumps(self._found, indent=1, sort_keys=True) + "\n")
        return self.report(cell)


def compile_cell(
    file: str, settings: dict[str, Any], topology: str, names: list[str]
) -> dict[str, Any]:
    """Compiles a recipe for a slice, up to the first part that does not fit."""
    from gkd_jax.experiment import Experiment
    from gkd_jax.experiment.gin_files import configuration
    from gkd_jax.run_modes import compile_ahead

    values = dict.fromkeys(PATHS, "none") | settings
    config = configuration.parse(
        roots=(Experiment,),
        gin_files=[str(ROOT / file)],
        bindings=[f"{name} = {value!r}" for name, value in values.items()],
    )
    report = compile_ahead.compile_for(
        config.build(), topology, stop_where_it_does_not_fit=True, names=names
    )
    return dataclasses.asdict(report)


def smallest(recipe: Recipe, results: Results, *, may_compile: bool) -> list[tuple[str, Any]]:
    """Returns reports on the smallest slice that fits the recipe, after the next smaller one."""
    from gkd_jax.devices import chips

    found: list[tuple[str, Any]] = []
    for size in chips.CHIPS[recipe.chip].slices:
        cell = Cell(recipe, f"{recipe.chip}:{size}")
        report = results.compile(cell) if may_compile else results.report(cell)
        if report is None:
            break
        found = [*found[-1:], (cell.topology, report)]
        if report.fits:
            break
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table."""
    return "\n".join(
        [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        + [f"| {' | '.join(row)} |" for row in rows]
    )


def mib(size: float) -> str:
    """Formats a number of bytes in MiB."""
    return f"{size / 2**20:,.0f}"


def describe_needed(report: Any) -> str:
    """Describes the part that needs the most memory of a chip, and its share."""
    worst = max(report.parts, key=report.share)
    if worst.temporaries is None:
        return f"{worst.name}: {worst.needed}"
    return f"{worst.name}: {report.share(worst):.0%}"


def describe_bounds(report: Any) -> tuple[str, str]:
    """Describes lower bounds on the times of a step and a rollout, and what binds each."""
    from gkd_jax.run_modes.compile_report import roofline

    parts = {part.name: part for part in report.parts if part.temporaries is not None}
    texts = []
    for name in ("train step", "rollout"):
        if name not in parts:
            texts.append("")
            continue
        seconds, bound = roofline(parts[name].cost, report.chip)
        texts.append(f"{seconds:.3f}, {bound}")
    return texts[0], texts[1]


def describe_flops(report: Any) -> tuple[str, str]:
    """Describes FLOPs of each part over the minimum, and the share that the step recomputes."""
    ratios = [
        f"{report.of_least(part):.2f}" for part in report.parts if part.temporaries is not None
    ]
    step = report.parts[0]
    return " / ".join(ratios), f"{step.recomputed / step.least:.0%}"


def compile_seconds(report: Any) -> str:
    """Returns the compile time of all parts, as text."""
    return f"{sum(part.seconds_to_compile for part in report.parts):.0f}"


def recipes_table(results: Results, recipes: Sequence[Recipe], *, may_compile: bool) -> str:
    """Builds the table of the smallest slice that fits each recipe, and the next smaller one."""
    rows = []
    for recipe in recipes:
        for topology, report in smallest(recipe, results, may_compile=may_compile):
            rows.append(
                (
                    recipe.name,
                    topology,
                    "yes" if report.fits else "**no**",
                    mib(report.resident),
                    describe_needed(report),
                    *describe_bounds(report),
                    *describe_flops(report),
                    compile_seconds(report),
                )
            )
    columns = (
        "recipe", "slice", "fits", "resident per chip, MiB", "largest part, of a chip",
        "step, lower bound, s", "rollout, lower bound, s", "FLOPs over the minimum", "recomputed",
        "compile time, s",
    )  # fmt: skip
    return table(columns, rows)


def scaling_table(results: Results, cells: Sequence[Cell]) -> str:
    """Builds the table of a step's memory and traffic on different slices."""
    from gkd_jax.run_modes.compile_report import describe_sent, roofline

    rows = []
    for cell in cells:
        report = results.report(cell)
        if report is None:
            continue
        step = report.parts[0]
        seconds, bound = roofline(step.cost, report.chip)
        rows.append(
            (
                cell.topology,
                str(cell.recipe.settings["BATCH_SIZE"]),
                mib(report.resident),
                mib(step.temporaries or 0),
                describe_sent(step.cost.collectives) or "nothing",
                describe_sent(step.cost.between_slices) or "nothing",
                f"{seconds:.3f}, {bound}",
                f"{report.of_least(step):.2f}",
                " + ".join(f"{part.seconds_to_compile:.0f}" for part in report.parts),
            )
        )
    columns = (
        "slice", "batch", "resident per chip, MiB", "step's temporaries, MiB",
        "sent per chip within the slice", "sent to other slices", "step, lower bound, s",
        "FLOPs over the minimum", "step's compile time, s",
    )  # fmt: skip
    return table(columns, rows)


def render(results: Results, recipes: Sequence[Recipe], *, may_compile: bool) -> str:
    """Renders all tables."""
    first = recipes_table(results, recipes, may_compile=may_compile)
    return "\n\n".join(
        [
            "## The smallest slice for each recipe",
            first,
            f"## Weak scaling: {WEAK.name}, {ROWS_PER_CHIP} rows per chip",
            "Parameters split over all chips (`fsdp`):",
            scaling_table(results, list(weak_cells("fsdp"))),
            "Parameters on every chip (`standard`):",
            scaling_table(results, list(weak_cells("standard"))),
            f"## One slice and two: {QWEN.name}",
            scaling_table(results, list(slice_cells())),
        ]
    )


def write(tables: str) -> None:
    """Writes the tables between the marks of the document."""
    before, _, rest = DOCUMENT.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{after}")


def main() -> None:
    """Compiles missing results and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="text that a recipe's name must contain")
    parser.add_argument("--scaling", action="store_true", help="only the tables of one recipe")
    parser.add_argument("--render", action="store_true", help="compile nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.cell:
        print(json.dumps(compile_cell(*json.loads(args.cell))))
        return
    results = Results(RESULTS)
    if not args.render:
        for recipe in RECIPES:
            if args.only in recipe.name and not args.scaling:
                smallest(recipe, results, may_compile=True)
                write(render(results, RECIPES, may_compile=False))
        for cell in (*weak_cells("fsdp"), *weak_cells("standard"), *slice_cells()):
            if args.only in cell.recipe.name and (args.scaling or not args.only):
                results.compile(cell)
                write(render(results, RECIPES, may_compile=False))
    write(render(results, RECIPES, may_compile=False))


if __name__ == "__main__":
    main()
