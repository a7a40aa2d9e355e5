"""Prompts of one's own: from files and standard input, and one at a time."""

import dataclasses
import io
import json
import sys

import pytest
import small_runs

from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.prompts import with_prompts
from gkd_jax.experiment import Generation, Student
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.run_modes import generate, interactive
from gkd_jax.sampling.methods import Sample

PROMPTS = ["Ann has 3 figs.", "Bob has 4 pears, gives 1.\nHow many?", ""]


def experiment_of(folder, teacher, prompts=None, **changes):
    generation = Generation(
        small_runs.data("validation"), str(folder / "outputs.jsonl"), method=Sample(),
        prompts=prompts,
    )  # fmt: skip
    return small_runs.gkd(
        folder / "no_run", teacher,
        student=Student(small_runs.model(small_runs.TEACHER_WIDTH), str(teacher)),
        generation=dataclasses.replace(generation, **changes), evaluation=None,
    )  # fmt: skip


def lines_of(prompts) -> str:
    return "".join(prompt.replace("\n", "\\n") + "\n" for prompt in prompts)


def test_files_and_standard_input_give_the_same_outputs(tiny_teacher, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text(lines_of(PROMPTS))
    as_json = "".join(json.dumps({"inputs": prompt}) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(as_json)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines_of(PROMPTS)))
    written = []
    for number, where in enumerate(
        (str(tmp_path / "prompts.txt"), str(tmp_path / "prompts.jsonl"), "-")
    ):
        output = tmp_path / f"{number}.jsonl"
        generate.generate(experiment_of(tmp_path, tiny_teacher, where, output=str(output)))
        written.append(output.read_text())
    assert len(set(written)) == 1
    rows = [json.loads(line) for line in written[0].splitlines()]
    assert [row["inputs"] for row in rows] == PROMPTS
    assert all(row["log_prob"] < 0 for row in rows)


def test_prompts_end_as_the_datas_do(tiny_teacher):
    """A decoder-only model's do not; an override holds."""
    for inputs_eos in (None, False):
        config = with_prompts(small_runs.data(inputs_eos=inputs_eos), ["ab"])
        batch, _ = next(Dataset(config).eval_batches())
        ended = [3 + 97, 3 + 98, 1]
        wanted = ended if inputs_eos is None else ended[:2]
        assert batch.inputs[0][batch.inputs_mask[0]].tolist() == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file|does not exist|missing"),
        ("", r"prompts\.txt"),
    ],
)
def test_prompts_that_are_not_there_are_refused(content, message, tiny_teacher, tmp_path):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        generate.generate(experiment_of(tmp_path, tiny_teacher, str(path)))


def test_interactive_answers_each_line_as_generate_does(
    tiny_teacher, tmp_path, monkeypatch, capsys
):
    (tmp_path / "prompts.txt").write_text(lines_of(PROMPTS))
    generate.generate(experiment_of(tmp_path, tiny_teacher, str(tmp_path / "prompts.txt")))
    rows = small_runs.rows(tmp_path / "outputs.jsonl")
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines_of(PROMPTS)))
    interactive.interactive(experiment_of(tmp_path, tiny_teacher))
    printed = capsys.readouterr().out
    wanted = "".join(
        f"{row['targets']}\n  [log-probability {row['log_prob']:.2f}]\n" for row in rows
    )
    assert printed == wanted
    with pytest.raises(ConfigurationError, match=r"interactive answers as Experiment\.generation"):
        interactive.interactive(
            dataclasses.replace(experiment_of(tmp_path, tiny_teacher), generation=None)
        )
