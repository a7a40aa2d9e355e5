"""Run mode `study`: a few runs that build on each other, and one table that compares them."""

import dataclasses
import json
import time

import jax
from absl import logging
from etils import epath

from gkd_jax import evaluate, plots, prepare, runtime, train
from gkd_jax.experiment import Evaluation, Experiment, Student
from gkd_jax.metrics.score import Score
from gkd_jax.objectives.divergences import NegativeLogLikelihood


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      name: its folder's name, and its row in the table.
      experiment: what runs; its `model_dir` is set by the study.
      student_from: an earlier cell, whose trained student this one starts from; None keeps the
        experiment's own `initial_checkpoint`.
      teacher_from: an earlier cell, whose trained student teaches; None keeps the experiment's
        own teacher.
    """

    name: str
    experiment: Experiment
    student_from: str | None = None
    teacher_from: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs in order, and their comparison on one test set.

    Attributes:
      cells: the runs; a cell may build on those before it.
      model_dir: the study's folder; each cell has a folder in it.
      test: the examples and the decoding method that compare the trained students.
      metric: the score that the table is about.
      seeds: each cell runs once for each seed. A cell builds on the same seed of another.
    """

    cells: tuple[Cell, ...]
    model_dir: str
    test: Evaluation
    metric: str
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        object.__setattr__(self, "cells", tuple(self.cells))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        names: list[str] = []
        for cell in self.cells:
            for field in ("student_from", "teacher_from"):
                other = getattr(cell, field)
                if other is not None and other not in names:
                    raise ValueError(
                        f"Cell.{field} of {cell.name!r} must name an earlier cell; got {other!r} "
                        f"and the earlier ones {names}. Correct the name or the order of "
                        "Study.cells."
                    )
            if cell.name in names:
                raise ValueError(f"Study.cells has two cells named {cell.name!r}; rename one.")
            names.append(cell.name)
        if not names:
            raise ValueError("Study.cells is empty. Give at least one Cell.")
        if not self.seeds:
            raise ValueError("Study.seeds is empty. Give at least one seed, e.g. (0,).")

    def cell_dir(self, name: str, seed: int) -> str:
        """The folder of one cell for one seed."""
        suffix = "" if len(self.seeds) == 1 else f"_seed{seed}"
        return str(epath.Path(self.model_dir) / f"{name}{suffix}")

    def experiment_of(
        self, cell: Cell, *, seed: int | None = None, before_running: bool = False
    ) -> Experiment:
        """The cell's experiment with its folder, its seed and what it builds on filled in.

        With `before_running`, what earlier cells will train is left out, since it is not there.
        """
        seed = self.seeds[0] if seed is None else seed
        experiment = dataclasses.replace(
            cell.experiment, model_dir=self.cell_dir(cell.name, seed), seed=seed
        )
        if cell.student_from is not None:
            start = None if before_running else self.cell_dir(cell.student_from, seed)
            student = dataclasses.replace(experiment.student, initial_checkpoint=start)
            experiment = dataclasses.replace(experiment, student=student)
        if cell.teacher_from is not None and experiment.teacher is not None and not before_running:
            teacher = dataclasses.replace(
                experiment.teacher, checkpoint=self.cell_dir(cell.teacher_from, seed)
            )
            experiment = dataclasses.replace(experiment, teacher=teacher)
        return experiment


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a study's table."""

    name: str
    seed: int
    num_params: int
    score: Score
    seconds: float


def run_study(study: Study) -> list[Row]:
    """Runs every cell, compares them on the test set and writes the table and the curves.

    Cells that an earlier run finished are not trained again.

    Returns:
      The table's rows; the table is also in `model_dir` as results.md and results.json, and the
      learning curves as curves.png.
    """
    rows: list[Row] = []
    for seed in study.seeds:
        for cell in study.cells:
            experiment = study.experiment_of(cell, seed=seed)
            teacher = experiment.teacher
            if teacher is not None and cell.teacher_from is None and not _has(rows, "teacher"):
                as_student = dataclasses.replace(
                    experiment,
                    student=Student(teacher.model, teacher.checkpoint),
                    model_dir=study.cell_dir("teacher", seed),
                )
                rows.insert(0, _measure(study, "teacher", seed, as_student, seconds=0.0))
            logging.info("study: %s, seed %d", cell.name, seed)
            start = time.monotonic()
            train.train(experiment)
            seconds = time.monotonic() - start
            rows.append(_measure(study, cell.name, seed, experiment, seconds=seconds))
            _write_table(study, rows)
    plots.plot_curves(
        {
            f"{cell.name} {seed}" if len(study.seeds) > 1 else cell.name: study.cell_dir(
                cell.name, seed
            )
            for cell in study.cells
            for seed in study.seeds
        },
        metric=f"eval/{study.metric}",
        path=str(epath.Path(study.model_dir) / "curves.png"),
    )
    return rows


def _has(rows: list[Row], name: str) -> bool:
    return any(row.name == name for row in rows)


def _measure(study: Study, name: str, seed: int, experiment: Experiment, *, seconds: float) -> Row:
    """Scores the experiment's student on the study's test set."""
    experiment = dataclasses.replace(
        experiment,
        evaluation=study.test,
        teacher=None,
        objective=dataclasses.replace(
            experiment.objective, divergence=NegativeLogLikelihood(), 
        ),
        seed=seed,
    )
    prepared = prepare.prepare(experiment, run_mode="eval")
    assert prepared.eval_data is not None
    params, step = runtime.student_to_use(experiment)
    result = evaluate.Evaluator(experiment, prepared.eval_data)(params, None, step=step)
    if study.metric not in result.scores:
        raise ValueError(
            f"Study.metric {study.metric!r} is not among the scores of the test set: "
            f"{sorted(result.scores)}. Set Study.metric to one of them."
        )
    num_params = prepare.num_params(experiment.student.model)
    return Row(name, seed, num_params, result.scores[study.metric], seconds)


def format_table(study: Study, rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"| run | seed | parameters | {study.metric} | standard error | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = row.score.standard_error
        lines.append(
            f"| {row.name} | {row.seed} | {row.num_params:,} | {row.score.value:.4g} | "
            f"{'' if error is None else f'{error:.2g}'} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def _write_table(study: Study, rows: list[Row]) -> None:
    if jax.process_index() != 0:
        return
    folder = epath.Path(study.model_dir)
    (folder / "results.md").write_text(format_table(study, rows) + "\n")
    results = [dataclasses.asdict(row) for row in rows]
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
