"""Run mode generate: whole outputs of every prompt, once, however often it was stopped."""

import dataclasses
import math
import pathlib
import shutil

import pytest
import small_runs

from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.recipes import instruction
from gkd_jax.data.sources import InMemory, JsonLines
from gkd_jax.experiment import Evaluation, Generation, Student
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.run_modes import generate, train
from gkd_jax.run_modes.evaluate import Evaluator
from gkd_jax.sampling.methods import Greedy, Sample
from gkd_jax.training import jitted_functions, parameters


def experiment_of(folder, teacher, *, task=None, model="student", student=None, **changes):
    """Prompts of the ten held-out problems, or of a task's validation split."""
    data = small_runs.data("validation", **({} if task is None else {"task": task}))
    output = str(folder / "outputs.jsonl")
    generation = Generation(data, output, model=model, method=Sample(), num_samples=2)
    return small_runs.gkd(
        folder / "no_run",
        teacher,
        student=Student(small_runs.model(small_runs.TEACHER_WIDTH), student or str(teacher)),
        generation=dataclasses.replace(generation, **changes),
        evaluation=None,
    )


@pytest.fixture(scope="module")
def whole(tiny_teacher, tmp_path_factory):
    """A file that nothing interrupted."""
    experiment = experiment_of(tmp_path_factory.mktemp("whole"), tiny_teacher)
    path = pathlib.Path(generate.generate(experiment))
    assert str(path) == experiment.generation.output
    return path


def copy_of(whole, folder) -> pathlib.Path:
    """The file, and what tells which generation it is of, in another folder."""
    for name in (whole.name, f"{whole.name}.identity"):
        shutil.copy(whole.parent / name, folder / name)
    return folder / whole.name


def test_every_prompt_has_its_outputs(whole):
    rows = small_runs.rows(whole)
    assert [row["index"] for row in rows] == [
        i for i in range(small_runs.NUM_HELDOUT) for _ in "ab"
    ]
    dataset = Dataset(small_runs.data("validation"))
    for row in rows:
        example = dataset.raw(row["index"])
        assert row["inputs"] == example.inputs
        assert row["references"] == list(example.references)
        assert math.isfinite(row["log_prob"])
        assert row["log_prob"] < 0
    # The two samples of a prompt have noise of their own.
    assert sum(a["targets"] == b["targets"] for a, b in zip(rows[::2], rows[1::2], strict=True)) < 5


# Cut after so many bytes: at once, in the first line, within the second batch's second samples.
@pytest.mark.parametrize("cut", [0.0, 0.01, 0.52, 0.99])
def test_a_stopped_file_is_completed_to_the_same(cut, whole, tiny_teacher, tmp_path):
    path, content = copy_of(whole, tmp_path), whole.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    generate.generate(experiment_of(tmp_path, tiny_teacher))
    assert path.read_bytes() == content


def test_a_complete_file_is_not_made_again(whole, tiny_teacher, tmp_path, monkeypatch):
    path = copy_of(whole, tmp_path)
    fail = lambda *args, **kwargs: lambda *args: pytest.fail("decoded")  # noqa: E731
    monkeypatch.setattr(jitted_functions, "jit_rollout", fail)
    generate.generate(experiment_of(tmp_path, tiny_teacher))
    assert path.read_bytes() == whole.read_bytes()


def test_a_cut_within_a_character(tiny_teacher, tmp_path):
    """And characters that Python takes for the end of a line."""
    texts = [f"žluť\u2028oučký\x85kůň {number}" for number in range(6)]
    source = InMemory(tuple({"inputs": text, "targets": "x"} for text in texts))
    task = instruction(train=source, validation=source)
    experiment = experiment_of(tmp_path, tiny_teacher, task=task)
    path = pathlib.Path(generate.generate(experiment))
    complete = path.read_bytes()
    assert [row["inputs"] for row in small_runs.rows(path)] == [t for t in texts for _ in "ab"]
    last = complete.rindex("ž".encode())
    path.write_bytes(complete[: last + 1])
    generate.generate(experiment)
    assert path.read_bytes() == complete


def test_greedy_outputs_are_those_of_an_evaluation(tiny_teacher, tmp_path):
    experiment = experiment_of(tmp_path, tiny_teacher, method=Greedy(), num_samples=1)
    path = pathlib.Path(generate.generate(experiment))
    evaluation = Evaluation(experiment.generation.data, num_divergence_examples=0)
    evaluator = Evaluator(
        dataclasses.replace(experiment, evaluation=evaluation), Dataset(evaluation.data)
    )
    result = evaluator(parameters.init_params(experiment), None)
    assert [row["targets"] for row in small_runs.rows(path)] == result.predictions


def test_another_generation_refuses_the_old_file(whole, tiny_teacher, tmp_path):
    path = copy_of(whole, tmp_path)
    other_student = tmp_path / "other"
    student = Student(small_runs.model(small_runs.TEACHER_WIDTH))
    train.train(small_runs.sft(other_student, student=student, num_steps=5, seed=3))
    for changes in (
        {"method": Sample(temperature=0.5)},
        {"num_samples": 1},
        {"student": str(other_student)},
    ):
        with pytest.raises(ValueError, match=r"was written by another generation .* new file"):
            generate.generate(experiment_of(tmp_path, tiny_teacher, **changes))
    with pytest.raises(ValueError, match="was written by another generation"):
        generate.generate(dataclasses.replace(experiment_of(tmp_path, tiny_teacher), seed=1))
    assert path.read_bytes() == whole.read_bytes()


def test_a_file_of_the_users_own_is_left_alone(tiny_teacher, tmp_path):
    experiment = experiment_of(tmp_path, tiny_teacher)
    path = pathlib.Path(experiment.generation.output)
    path.write_text("mine\n")
    with pytest.raises(ValueError, match=r"Set Generation\.output to a new file"):
        generate.generate(experiment)
    assert path.read_text() == "mine\n"


def test_the_teachers_outputs_are_training_data(tiny_teacher, tmp_path):
    """Sequence-level distillation: the student is fine-tuned on what the teacher wrote."""
    experiment = experiment_of(tmp_path, tiny_teacher, model="teacher")
    path = pathlib.Path(generate.generate(experiment))
    task = instruction(train=JsonLines(str(path)))
    seqkd = small_runs.sft(tmp_path / "seqkd", train_data=small_runs.data(task=task), num_steps=5)
    dataset = Dataset(seqkd.train_data)
    assert dataset.num_examples == 2 * small_runs.NUM_HELDOUT
    for index, row in enumerate(small_runs.rows(path)):
        example = dataset.raw(index)
        assert (example.inputs, example.targets) == (row["inputs"], row["targets"])
    result = train.train(seqkd)
    assert int(result.state.step) == 5


def test_what_is_missing_is_said(tiny_teacher, tmp_path):
    experiment = experiment_of(tmp_path, tiny_teacher, model="teacher")
    (tmp_path / "file").write_text("")
    in_the_way = dataclasses.replace(
        experiment.generation, output=str(tmp_path / "file" / "outputs.jsonl")
    )
    for changes, message in (
        ({"teacher": None}, "Generation.model = 'teacher' needs a teacher"),
        ({"generation": None}, r"Experiment\.generation says; got None"),
        ({"generation": in_the_way}, r"Generation\.output cannot be written"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            generate.generate(dataclasses.replace(experiment, **changes))
    with pytest.raises(ValueError, match="num_samples above 1 needs a random method"):
        Generation(small_runs.data(), "x", num_samples=2)
