"""Every `gkd_jax.main` command in the documents and gin files: its flags and settings exist."""

import pathlib
import re
import shlex

import pytest
from absl import flags

from gkd_jax import main
from gkd_jax.experiment import Experiment
from gkd_jax.experiment.gin_files import configuration
from gkd_jax.experiment.gin_files.statements import MissingValues
from gkd_jax.run_modes.study import Study

ROOT = pathlib.Path(main.__file__).resolve().parents[1]
COMMAND = re.compile(r"python3? -m gkd_jax\.main\b")


def files_with_commands() -> list[pathlib.Path]:
    folders = ("gin_configs", "examples", "docs")
    paths = [path for name in folders for path in (ROOT / name).rglob("*.*")]
    return [
        path
        for path in (ROOT / "README.md", *sorted(paths))
        if path.suffix in (".md", ".gin", ".py") and COMMAND.search(path.read_text())
    ]


def commands_of(path: pathlib.Path) -> list[list[str]]:
    """The arguments of each command, joined over continued lines; without comment signs."""
    lines = [re.sub(r"^\s*#\s?", "", line) for line in path.read_text().splitlines()]
    if path.suffix == ".md":
        # Only in blocks of code: a sentence may name the command too.
        parts = "\n".join(path.read_text().splitlines()).split("```")
        lines = [line for part in parts[1::2] for line in part.splitlines()]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        shlex.split(line[COMMAND.search(line).end() :])
        for line in text.splitlines()
        if COMMAND.search(line) and "`" not in line
    ]


COMMANDS = [
    pytest.param(command, id=f"{path.relative_to(ROOT)}-{number}")
    for path in files_with_commands()
    for number, command in enumerate(commands_of(path))
]


def test_there_are_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("arguments", COMMANDS)
def test_flags_and_settings_of_a_command_exist(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = {"gin_file": [], "gin_bindings": []}
    is_whole = "..." not in arguments
    for argument in main.rewrite_gin_flags([a for a in arguments if a != "..."]):
        name, _, value = argument.removeprefix("--").partition("=")
        assert argument.startswith("--"), argument
        assert name in flags.FLAGS, argument
        values.setdefault(name, []).append(value)
    try:
        configuration.parse(
            roots=(Study, Experiment),
            gin_files=values["gin_file"] or ["gin_configs/quickstart.gin"],
            bindings=values["gin_bindings"],
        )
    except MissingValues:
        # What "..." stands for.
        assert not is_whole
