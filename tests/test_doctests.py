"""Runs the examples in docstrings; modules that have any are found from the source."""

import doctest
import importlib
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_MODULES = sorted(
    ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    for path in (_ROOT / "gkd_jax").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", _MODULES)
def test_examples(name):
    module = importlib.import_module(name.removesuffix(".__init__"))
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0, "see the captured output"
    assert results.attempted > 0, "an example is in no docstring that doctest finds"


def test_there_are_examples():
    assert "gkd_jax.objectives.divergences" in _MODULES
