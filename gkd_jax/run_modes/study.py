"""Run mode `study`: several runs that may build on each other, and a table that compares them."""

import dataclasses
import json
import re
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from gkd_jax.data.metrics.score import Score
from gkd_jax.distillation.teachers import AbstractTeacher, Teacher
from gkd_jax.experiment import prepare
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.plan import describe_plan, num_params
from gkd_jax.experiment.problems import Problems
from gkd_jax.experiment.settings import Evaluation, Student
from gkd_jax.models.lora import base_of
from gkd_jax.objectives.divergences import NegativeLogLikelihood
from gkd_jax.objectives.objective import Objective
from gkd_jax.run_modes import evaluate, plots, train
from gkd_jax.training import interruption, parameters


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      name: name of the run's folder and of its row in the table.
      experiment: settings of the run. The study replaces `model_dir`, `seed` and
        `train_data.seed`.
      student_from: name of an earlier cell whose trained student is the initial student; None keeps
        the experiment's own `initial_checkpoint`.
      teacher_from: name of an earlier cell whose trained student is the teacher; None keeps the
        experiment's own teacher.
    """

    name: str
    experiment: Experiment
    student_from: str | None = None
    teacher_from: str | None = None

    def __post_init__(self) -> None:
        if self.teacher_from is not None and self.experiment.teacher is not None:
            raise ValueError(
                f"cell {self.name!r} has two teachers; got Cell.teacher_from = "
                f"{self.teacher_from!r} and an Experiment.teacher. Leave one of them out."
            )


@dataclasses.dataclass(frozen=True)
class Study:
    """Several runs in order, and their comparison on one test set.

    Attributes:
      cells: the runs. A cell may build on earlier ones.
      model_dir: folder of the study, with a folder for each cell.
      test: test examples and decoding method with which the trained students are compared.
      metric: name of the score in the table.
      seeds: seeds of the study. Every cell runs once with each seed. A cell that builds on another
        cell uses the run of that cell with the same seed.
    """

    cells: tuple[Cell, ...]
    model_dir: str
    test: Evaluation
    metric: str
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
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
            if cell.name in names or re.fullmatch(_GIVEN, cell.name):
                raise ValueError(
                    f"Study.cells: the name {cell.name!r} is taken. Give the cell another."
                )
            names.append(cell.name)
        if not names:
            raise ValueError("Study.cells is empty. Give at least one Cell.")
        if not self.seeds:
            raise ValueError("Study.seeds is empty. Give at least one seed, e.g. (0,).")

    def cell_dir(self, name: str, seed: int) -> str:
        """Returns the folder of one cell and seed."""
        suffix = "" if len(self.seeds) == 1 else f"_seed{seed}"
        return str(epath.Path(self.model_dir) / f"{name}{suffix}")

    def cell(self, name: str) -> Cell:
        """Returns the cell of this name."""
        return next(cell for cell in self.cells if cell.name == name)

    def experiment_of(self, cell: Cell, *, seed: int) -> Experiment:
        """Returns the cell's experiment with folder, seed, student and teacher filled in."""
        experiment = dataclasses.replace(
            cell.experiment,
            model_dir=self.cell_dir(cell.name, seed),
            seed=seed,
            train_data=dataclasses.replace(cell.experiment.train_data, seed=seed),
        )
        if cell.student_from is not None:
            start = self.cell_dir(cell.student_from, seed)
            student = dataclasses.replace(experiment.student, initial_checkpoint=start)
            experiment = dataclasses.replace(experiment, student=student)
        if cell.teacher_from is not None:
            teacher = Teacher(
                model=self.cell(cell.teacher_from).experiment.student.model,
                checkpoint=self.cell_dir(cell.teacher_from, seed),
            )
            experiment = dataclasses.replace(experiment, teacher=teacher)
        return experiment


# Row names of the models that no cell trains: the teacher's networks and the initial student.
_TEACHER, _STUDENT = "teacher", "student"
_GIVEN = rf"{_TEACHER}(_\d+)?|{_STUDENT}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a study's table.

    `seconds` is the training time; None for a model that the study does not train.
    """

    name: str
    seed: int
    num_params: int
    score: Score
    seconds: float | None


def check_study(study: Study) -> str:
    """Checks every cell and the test set as far as possible before the first run.

    Returns:
      The plan of each cell as text.

    Raises:
      ConfigurationError: lists everything that is wrong.
    """
    problems = Problems()
    plans: list[str] = []
    seed = study.seeds[0]
    trained = {
        study.cell_dir(cell.name, seed): cell.experiment.student.model for cell in study.cells
    }
    for cell in study.cells:
        experiment = study.experiment_of(cell, seed=seed)
        with problems.collecting(f"{cell.name}: "):
            prepared = prepare.prepare(experiment, run_mode="train", made_before=trained)
            plans.append(f"{cell.name}:\n{describe_plan(experiment, prepared)}")
    with problems.collecting("Study.test: "):
        experiment = _for_test(study, study.experiment_of(study.cells[0], seed=seed))
        # The models were checked above, so only the test data remain to be checked.
        model = base_of(experiment.student.model)
        student = Student(model, study.cell_dir(study.cells[0].name, seed))
        experiment = dataclasses.replace(
            experiment, student=student, model_dir=str(epath.Path(study.model_dir) / "nowhere")
        )
        whole = {path: base_of(model) for path, model in trained.items()}
        prepared = prepare.prepare(experiment, run_mode="eval", made_before=whole)
        assert prepared.eval_data is not None
        names = evaluate.score_names(prepared.eval_data)
        if study.metric not in names:
            raise ValueError(
                f"Study.metric must be a score of the test set's task; got {study.metric!r}. Set "
                f"it to one of {names}."
            )
    problems.raise_if_any()
    return "\n\n".join(plans)


def run_study(study: Study, *, before_start: Callable[[], None] | None = None) -> list[Row]:
    """Runs every cell, compares the students on the test set, and writes a table and a plot.

    Cells that an earlier call finished are not trained again.

    Args:
      study: the study.
      before_start: function that is called after all checks, before anything is written.

    Returns:
      The rows of the table. The table is also written to `model_dir` as results.md and
      results.json, and the learning curves as curves.png.

    Raises:
      ConfigurationError: lists everything that is wrong.
      InterruptedRunError: the process got SIGTERM; the state of the running cell is saved.
    """
    check_study(study)
    if before_start is not None:
        before_start()
    rows = [_measure(study, *given, seconds=None) for given in _given_networks(study)]
    with interruption.Interruption() as signals:
        for seed in study.seeds:
            for cell in study.cells:
                experiment = study.experiment_of(cell, seed=seed)
                logging.info("study: %s, seed %d", cell.name, seed)
                result = train.train(experiment)
                if signals.is_due():
                    raise interruption.InterruptedRunError(
                        f"stopped by SIGTERM after the run {cell.name} of the study. Give the same "
                        "command again to go on."
                    )
                rows.append(_measure(study, cell.name, experiment, seconds=result.seconds))
                _write_table(study, rows)
    _plot(study)
    return rows


def _given_networks(study: Study) -> list[tuple[str, Experiment]]:
    """Lists the networks that the study compares but does not train.

    They are the networks of the first teacher that has any, and the first initial student. Each
    entry has the name of the network's row in the table, and an experiment whose student is the
    network.
    """
    found: dict[str, Experiment] = {}
    seed = study.seeds[0]
    for cell in study.cells:
        experiment = study.experiment_of(cell, seed=seed)
        student, given = cell.experiment.student, {}
        if _TEACHER not in found:
            networks = _networks(cell.experiment.teacher)
            names = [_TEACHER, *(f"{_TEACHER}_{i}" for i in range(2, len(networks) + 1))]
            given = dict(zip(names, networks, strict=False))
        # If another cell trains the initial student, the row of that cell has its score.
        if cell.student_from is None and student.initial_checkpoint is not None:
            given.setdefault(_STUDENT, student)
        for name, network in given.items():
            if name not in found:
                found[name] = dataclasses.replace(
                    experiment, student=network, model_dir=study.cell_dir(name, seed)
                )
    # Teachers first.
    return sorted(found.items(), key=lambda item: item[0] == _STUDENT)


def _networks(teacher: AbstractTeacher | None) -> list[Student]:
    """Returns the networks of a teacher, each as the student of an experiment."""
    # The test data have the student's tokens, which a teacher with its own tokenizer cannot read.
    if teacher is None or teacher.own_tokens is not None:
        return []
    return [Student(one.model, one.checkpoint) for one in teacher.networks]


def _for_test(study: Study, experiment: Experiment) -> Experiment:
    """Returns the experiment with the study's test as its evaluation, without a teacher."""
    return dataclasses.replace(
        experiment,
        evaluation=dataclasses.replace(study.test, num_divergence_examples=0),
        teacher=None,
        objective=Objective(NegativeLogLikelihood()),
    )


def _measure(study: Study, name: str, experiment: Experiment, *, seconds: float | None) -> Row:
    """Scores the experiment's student on the study's test set."""
    experiment = _for_test(study, experiment)
    prepared = prepare.prepare(experiment, run_mode="eval")
    assert prepared.eval_data is not None
    student = parameters.student_to_use(experiment)
    evaluator = evaluate.Evaluator(experiment, prepared.eval_data, folder="test")
    result = evaluator(student.params, None, step=student.step)
    # Only process 0, which writes the table, has the scores of the task.
    score = result.scores.get(study.metric, Score(float("nan")))
    size = num_params(experiment.student.model)
    return Row(name, experiment.seed, size, score, seconds)


def format_table(study: Study, rows: list[Row]) -> str:
    """Formats the rows as a Markdown table."""
    lines = [
        f"| run | seed | parameters | {study.metric} | standard error | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = row.score.standard_error
        lines.append(
            f"| {row.name} | {row.seed} | {row.num_params:,} | {row.score.value:.4g} | "
            f"{'' if error is None else f'{error:.2g}'} | "
            f"{'' if row.seconds is None else f'{row.seconds:.0f}'} |"
        )
    return "\n".join(lines)


def _write_table(study: Study, rows: list[Row]) -> None:
    if jax.process_index() != 0:
        return
    folder = epath.Path(study.model_dir)
    (folder / "results.md").write_text(format_table(study, rows) + "\n")
    results = [dataclasses.asdict(row) for row in rows]
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def _plot(study: Study) -> None:
    if jax.process_index() != 0:
        return
    runs = {
        f"{cell.name} {seed}" if len(study.seeds) > 1 else cell.name: study.cell_dir(
            cell.name, seed
        )
        for cell in study.cells
        for seed in study.seeds
    }
    path = str(epath.Path(study.model_dir) / "curves.png")
    plots.plot_curves(runs, metric=f"eval/{study.metric}", path=path)
