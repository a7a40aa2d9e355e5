"""The repository as a whole: gin files, packaging, and what must not be in it."""

import argparse
import importlib
import json
import pathlib
import re
import subprocess
import tomllib

import pytest

from gkd_jax.experiment import Experiment
from gkd_jax.experiment.gin_files import configuration
from gkd_jax.experiment.gin_files.statements import MissingValues
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.decoder_only import DecoderOnly
from gkd_jax.models.families import model_to_hf
from gkd_jax.run_modes.study import Study

_ROOT = pathlib.Path(__file__).parent.parent
_GIN_FOLDERS = ("gin_configs", "examples")
# T5X's trainer reads these, with gin's own parser: tests/test_t5x_trainer.py.
_OF_T5X = "gin_configs/t5x/"
_GIN_FILES = sorted(
    name
    for folder in _GIN_FOLDERS
    for path in (_ROOT / folder).rglob("*.gin")
    if not (name := str(path.relative_to(_ROOT))).startswith(_OF_T5X)
)
# Parts of other files that neither base/ nor small/ shows to be such.
_PARTS = (
    "examples/multi30k/sft.gin",
    "examples/multi30k/task.gin",
    "examples/stories/task.gin",
)


def _is_included_only(name: str) -> bool:
    """A part of other files: in base/, or in small/ without a file that it makes small."""
    made_small = name.replace("gin_configs/small/", "gin_configs/")
    is_small = made_small != name
    in_base = name.startswith("gin_configs/base/")
    return in_base or name in _PARTS or (is_small and made_small not in _GIN_FILES)


# Recipes that files are given after. methods/X.gin is given after gsm8k.gin and small/X.gin after
# X.gin; this table has the others.
_AFTER = {
    "gin_configs/generate.gin": "gin_configs/wmt_ende.gin",
    "gin_configs/store_teacher.gin": "gin_configs/wmt_ende.gin",
    "gin_configs/export.gin": "gin_configs/wmt_ende.gin",
    "gin_configs/interactive.gin": "gin_configs/wmt_ende.gin",
    "gin_configs/hf.gin": "gin_configs/gsm8k.gin",
    "gin_configs/lora.gin": "gin_configs/gsm8k.gin",
    "gin_configs/methods/seqkd.gin": "gin_configs/sft/wmt_ende.gin",
    "examples/entailment_reward.gin": "gin_configs/xsum.gin",
    "examples/json_lines/headlines.gin": "gin_configs/sft/arithmetic.gin",
}


def _recipe_before(name: str) -> str:
    """Returns the recipe that a gin file is given after; the file itself if it is a recipe."""
    if name in _AFTER:
        return _AFTER[name]
    if name.startswith("gin_configs/methods/"):
        return "gin_configs/gsm8k.gin"
    return name.replace("gin_configs/small/", "gin_configs/")


# Given to what a gin file requires (`%gin.REQUIRED`), by the end of its name; a path otherwise.
_PLACEHOLDERS = {
    "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 64}",
    "STEPS": "100",
    "BATCH_SIZE": "8",
    "VOCAB_SIZE": "8000",
}


def _placeholder(name: str) -> str:
    for end, value in _PLACEHOLDERS.items():
        if name.endswith(end):
            return value
    return f"'/nowhere/{name.lower()}'"


def _parse_with_placeholders(
    names: list[str], bindings: tuple[str, ...] = ()
) -> configuration.GinConfig:
    roots = (Study, Experiment)
    files = [str(_ROOT / name) for name in names]
    try:
        return configuration.parse(roots=roots, gin_files=files, bindings=bindings)
    except MissingValues as error:
        missing = [f"{name} = {_placeholder(name)}" for name in error.names]
        return configuration.parse(roots=roots, gin_files=files, bindings=[*bindings, *missing])


def _checkpoints_for(names: list[str], folder: pathlib.Path) -> tuple[str, ...]:
    """Bindings to a checkpoint whose config.json makes the models, where one does."""
    if not any("hf.hf_model" in (_ROOT / name).read_text() for name in names):
        return ()
    plain = DecoderConfig(256, 16, 2, 2, 8, 16, ("full",))
    (folder / "config.json").write_text(json.dumps(model_to_hf(DecoderOnly(plain))))
    given = ["TEACHER_CHECKPOINT_PATH"]
    given += ["INITIAL_CHECKPOINT_PATH"] if "gin_configs/hf.gin" in names else []
    return tuple(f"{name} = '{folder}'" for name in given)


@pytest.mark.parametrize("name", [name for name in _GIN_FILES if not _is_included_only(name)])
def test_gin_file_builds_all_that_it_names(name, monkeypatch, tmp_path):
    """By itself, or after the file that it is meant to follow."""
    monkeypatch.chdir(_ROOT)
    before = _recipe_before(name)
    config = _parse_with_placeholders([before, name], _checkpoints_for([before, name], tmp_path))
    experiment = config.build()
    assert isinstance(experiment, Study | Experiment)
    again = configuration.parse_text(config.text, roots=(config.root,), name="config.gin")
    assert again.settings == config.settings
    assert again.build() == experiment


def test_methods_that_are_compared_need_no_more_than_the_recipe(monkeypatch):
    """`examples/compare_methods.py` builds what it runs by default."""
    monkeypatch.syspath_prepend(str(_ROOT / "examples"))
    compare = importlib.import_module("compare_methods")
    flags = argparse.Namespace(
        gin_file=["gin_configs/arithmetic.gin"],
        bindings=["--gin.INITIAL_CHECKPOINT_PATH='none'"],
        model_dir="none",
        same_size_teacher="none",
    )
    monkeypatch.setattr(compare, "run", lambda arguments: None)
    methods = compare.default_methods(flags)
    assert {"minillm", "same_size_teacher", "seqkd"} < set(methods)
    for method in methods:
        arguments = compare.method_flags(flags, method, seed=0)[3:]
        files = [one.partition("=")[2] for one in arguments if one.startswith("--gin_file=")]
        settings = [one.removeprefix("--gin.") for one in arguments if one.startswith("--gin.")]
        configuration.parse(
            roots=(Experiment,), gin_files=files, bindings=[*settings, "MODEL_DIR='none'"]
        ).build()


def test_every_method_is_listed():
    """In the table of methods of docs/recipes.md, and nothing else is."""
    text = (_ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = text.partition("\n## Methods\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    files = (_ROOT / "gin_configs" / "methods").glob("*.gin")
    assert sorted(listed) == sorted(file.stem for file in files)


def test_every_part_is_included_by_a_gin_file():
    texts = [(_ROOT / name).read_text() for name in _GIN_FILES]
    parts = filter(_is_included_only, _GIN_FILES)
    assert [name for name in parts if not any(f"{name}'" in text for text in texts)] == []


def test_the_default_gin_file_exists():
    assert "gin_configs/quickstart.gin" in _GIN_FILES


def _tracked_files() -> list[pathlib.Path]:
    if not (_ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(
        ["git", "-C", str(_ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in names.split("\0") if name and (path := _ROOT / name).is_file()]


def test_no_file_is_large():
    limit = 5 * 2**20
    large = [(str(path), path.stat().st_size) for path in _tracked_files()]
    assert [(name, size) for name, size in large if size > limit] == []


# What would tie the code to the place where it was written. The words are put together here so
# that this file does not contain them.
_FORBIDDEN = {
    "a path of one machine": re.compile("/" + r"(work|root|home/\w+)/"),
    "a folder beside the repository": re.compile(r"\.\./" + "shared"),
    "a host of a package index": re.compile("py" + r"pi\.org|" + "python" + r"hosted\.org"),
    "an unfinished part": re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + r"X)\b"),
}
# CI itself knows where its data lies.
_EXEMPT = {".ci/run": {"a folder beside the repository"}}


def test_nothing_ties_the_code_to_a_place():
    found = []
    for path in _tracked_files():
        name = str(path.relative_to(_ROOT))
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for what, pattern in _FORBIDDEN.items():
            if what in _EXEMPT.get(name, ()):
                continue
            found += [
                f"{name}:{number}: {what}: {line.strip()[:100]}"
                for number, line in enumerate(lines, start=1)
                if pattern.search(line)
            ]
    assert found == []


def _pyproject() -> dict:
    return tomllib.loads((_ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed():
    """Packages are listed one by one, since the gin files' folder is installed as one of them."""
    listed = set(_pyproject()["tool"]["setuptools"]["packages"])
    packages = {
        ".".join(path.parent.relative_to(_ROOT).parts)
        for path in (_ROOT / "gkd_jax").rglob("__init__.py")
    }
    assert listed == packages | {"gkd_jax.gin_configs"}
    folders = {path.parent for path in (_ROOT / "gkd_jax").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def _name(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return name[0].lower().replace("_", "-").replace(".", "-")


def test_requirements_pin_what_pyproject_wants():
    project = _pyproject()["project"]
    extras = project["optional-dependencies"]

    def pinned(file: str) -> dict[str, str]:
        lines = (_ROOT / file).read_text().splitlines()
        lines = [line for line in lines if line and not line.startswith(("#", "-r "))]
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
        return {_name(line): line.partition("==")[2] for line in lines}

    full, dev = pinned("requirements.txt"), pinned("requirements-dev.txt")
    wanted = [*project["dependencies"], *extras["text"], *extras["data"], *extras["plot"]]
    wanted += extras["tensorboard"]
    names = {_name(requirement) for requirement in wanted} - {"gkd-jax"}
    assert names - set(full) == set()
    assert {_name(requirement) for requirement in extras["dev"]} - set(full | dev) == set()
    assert set(full) & set(dev) == set()
