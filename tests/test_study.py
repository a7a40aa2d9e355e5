"""Studies: runs that build on each other, the table that compares them, and their resumption."""

import dataclasses
import json
import pathlib
import runpy

import pytest
import small_runs

from gkd_jax.checkpoints import manager
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment import Evaluation, Student
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.run_modes import dry_run, study, train
from gkd_jax.run_modes.study import Cell, Study
from gkd_jax.sampling.methods import Sample
from gkd_jax.training import parameters

ROOT = pathlib.Path(__file__).parents[1]


def evaluation(split: str) -> Evaluation:
    data = small_runs.data(split)
    return Evaluation(data, period=5, method=Sample(), num_divergence_examples=0)


def make_study(folder, **changes) -> Study:
    """A teacher, an SFT student, and that student distilled from that teacher."""
    evaluated = {"evaluation": evaluation("validation")}
    teacher_student = Student(small_runs.model(small_runs.TEACHER_WIDTH))
    gkd = small_runs.gkd(folder, folder, num_steps=5, student=Student(small_runs.model()))
    cells = (
        Cell("big", small_runs.sft(folder, student=teacher_student, **evaluated)),
        Cell("sft", small_runs.sft(folder, **evaluated)),
        Cell(
            "gkd",
            dataclasses.replace(gkd, teacher=None, **evaluated),
            student_from="sft",
            teacher_from="big",
        ),
    )
    made = Study(cells, str(folder), test=evaluation("test"), metric="gsm8k_accuracy")
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "study"
    made = make_study(folder)
    return made, study.run_study(made), folder


def test_the_table_has_each_cell(finished):
    made, rows, folder = finished
    assert [row.name for row in rows] == ["big", "sft", "gkd"]
    assert rows[0].num_params > rows[1].num_params == rows[2].num_params
    assert all(row.seconds > 0 for row in rows)
    table = (folder / "results.md").read_text()
    assert table == study.format_table(made, rows) + "\n"
    assert table.count("\n") == 2 + len(rows)
    stored = json.loads((folder / "results.json").read_text())
    assert [row["score"]["value"] for row in stored] == [row.score.value for row in rows]


def test_runs_are_compared_pair_by_pair(finished, capsys):
    """The script of examples/multi30k on this study: each run, by seed and in the mean."""
    pytest.importorskip("sacrebleu")
    made, _, _ = finished
    script = runpy.run_path(str(ROOT / "examples" / "multi30k" / "compare.py"))
    script["print_differences"](made, "sft")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [name, seed] for name in ("big", "sft", "gkd") for seed in ("0", "mean")
    ]
    assert [row[3:] for row in rows if row[0] == "sft"] == [["+0.00", "0.00"]] * 2
    scores = {row[0]: float(row[2]) for row in rows}
    assert float(rows[0][3]) == pytest.approx(scores["big"] - scores["sft"], abs=0.011)


def test_curves_are_a_picture(finished):
    pytest.importorskip("matplotlib")
    _, _, folder = finished
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_cells_build_on_earlier_ones(finished):
    """The distilled student starts where the SFT student ended, and is taught by the teacher."""
    made, _, folder = finished
    experiment = made.experiment_of(made.cells[2], seed=0)
    assert experiment.student.initial_checkpoint == str(folder / "sft")
    assert experiment.teacher == Teacher(
        small_runs.model(small_runs.TEACHER_WIDTH), str(folder / "big")
    )
    start = parameters.init_params(experiment)
    sft = parameters.student_to_use(made.experiment_of(made.cells[1], seed=0))
    small_runs.assert_equal_bits(start, sft.params)
    log = small_runs.metrics(folder / "gkd")
    assert {"train/on_policy/loss", "train/data/loss"} & set(log[1])


def test_the_test_set_is_another_than_the_evaluations(finished):
    _, _, folder = finished
    names = ("eval", "test")
    first, second = (
        [row["inputs"] for row in small_runs.rows(folder / "gkd" / name / "predictions_5.jsonl")]
        for name in names
    )
    assert len(first) == len(second) == small_runs.NUM_HELDOUT
    assert not set(first) & set(second)


def test_a_finished_study_is_not_trained_again(finished, monkeypatch):
    made, rows, folder = finished

    def step(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(train.Trainer, "step", step)
    again = study.run_study(made)
    assert [row.score for row in again] == [row.score for row in rows]
    for row in again:  # What training took until its last save, not what looking took.
        host = json.loads((folder / row.name / "checkpoint_5" / "host.json").read_text())["host"]
        assert row.seconds > host["seconds"] > 0


@pytest.mark.slow
def test_a_stopped_study_goes_on_with_the_cell_that_was_stopped(finished, tmp_path, monkeypatch):
    made = make_study(tmp_path / "study")
    original = train.Trainer.step
    steps = []

    def step(self, state, batch, step):
        steps.append((self.experiment.model_dir.rpartition("/")[2], step))
        if len(steps) == 12:
            raise KeyboardInterrupt
        return original(self, state, batch, step)

    monkeypatch.setattr(train.Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        study.run_study(made)
    rows = study.run_study(made)
    assert [name for name, _ in steps] == ["big"] * 5 + ["sft"] * 5 + ["gkd"] * (2 + 5)
    assert [row.score for row in rows] == [row.score for row in finished[1]]


@pytest.mark.slow
def test_seeds_and_a_given_teacher(tiny_teacher, tmp_path):
    """Each seed has its folders and its order of data; the teacher is a row, and once."""
    gkd = small_runs.gkd(
        tmp_path, tiny_teacher, num_steps=5, student=Student(small_runs.model()),
        evaluation=evaluation("validation"),
    )  # fmt: skip
    cells = (
        Cell("sft", small_runs.sft(tmp_path, evaluation=evaluation("validation"))),
        Cell("gkd", gkd, student_from="sft"),
    )
    made = make_study(tmp_path, cells=cells, seeds=(3, 4))
    rows = study.run_study(made)
    assert [(row.name, row.seed) for row in rows] == [
        ("teacher", 3), ("sft", 3), ("gkd", 3), ("sft", 4), ("gkd", 4),
    ]  # fmt: skip
    assert rows[0].seconds is None
    assert "| teacher | 3 | " in study.format_table(made, rows)
    for seed in (3, 4):
        experiment = made.experiment_of(made.cells[1], seed=seed)
        assert (experiment.seed, experiment.train_data.seed) == (seed, seed)
        assert experiment.model_dir == str(tmp_path / f"gkd_seed{seed}")
        assert experiment.student.initial_checkpoint == str(tmp_path / f"sft_seed{seed}")
        assert manager.newest_step(experiment.model_dir) == 5


@pytest.mark.slow
def test_the_given_student_is_a_row(tiny_teacher, tmp_path):
    """Where cells start from a checkpoint, its score stands beside theirs."""
    start = Student(small_runs.model(small_runs.TEACHER_WIDTH), str(tiny_teacher))
    cell = Cell("longer", small_runs.sft(tmp_path, student=start, num_steps=1))
    made = make_study(tmp_path / "study", cells=(cell,), seeds=(0, 1))
    rows = study.run_study(made)
    assert [(row.name, row.seed) for row in rows] == [("student", 0), ("longer", 0), ("longer", 1)]
    assert rows[0].seconds is None
    predictions = tmp_path / "study" / "student_seed0" / "test"
    assert len(list(predictions.glob("predictions_*.jsonl"))) == 1


def test_everything_is_checked_before_the_first_cell_runs(tmp_path, monkeypatch):
    """Data of the last cell, the test's metric, and models that do not fit each other."""
    monkeypatch.setattr(train.Trainer, "step", lambda *args: pytest.fail("a step was made"))
    folder = tmp_path / "study"
    made = make_study(folder)
    big, sft, gkd = made.cells
    wide = dataclasses.replace(gkd.experiment, student=Student(small_runs.model(32)))
    batch = dataclasses.replace(wide, num_microbatches=3)
    wrong = make_study(
        folder, cells=(big, sft, dataclasses.replace(gkd, experiment=batch)), metric="blue"
    )
    for run in (study.run_study, dry_run.dry_run):
        with pytest.raises(ConfigurationError) as error:
            run(wrong)
        texts = error.value.problems
        assert len(texts) == 3
        assert any(text.startswith("gkd: batch_size must be divisible") for text in texts)
        assert any(
            "Student.initial_checkpoint" in text and "of another shape" in text for text in texts
        )
        assert any("got 'blue'. Set it to one of ['gsm8k_accuracy']" in text for text in texts)
    assert not folder.exists()
    plan = dry_run.dry_run(made)
    assert all(f"{name}:\nstudent: " in plan for name in ("big", "sft", "gkd"))
    assert not folder.exists()


def test_wrong_studies_are_refused(tmp_path, tiny_teacher):
    made = make_study(tmp_path)
    big, sft, gkd = made.cells
    for cells, message in (
        ((gkd, big, sft), "must name an earlier cell; got 'sft'"),
        ((big, big), "the name 'big' is taken"),
        ((dataclasses.replace(big, name="teacher"),), "the name 'teacher' is taken"),
        ((), "Study.cells is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            make_study(tmp_path, cells=cells)
    with pytest.raises(ValueError, match=r"Study\.seeds is empty"):
        make_study(tmp_path, seeds=())
    with pytest.raises(ValueError, match="cell 'two' has two teachers"):
        Cell("two", small_runs.gkd(tmp_path, tiny_teacher), teacher_from="big")
