"""Each divergence of the package is exported, tested and documented."""

import importlib
import pathlib
import pkgutil
import re
import sys

import pytest
from divergence_references import EVERY

from gkd_jax import objectives
from gkd_jax.objectives import Divergence, PolicyGradient

_DOCUMENT = pathlib.Path(__file__).parent.parent.parent / "docs" / "objectives.md"


def _subclasses(kind: type[Divergence]) -> set[type[Divergence]]:
    found = set(kind.__subclasses__())
    return found.union(*map(_subclasses, found))


def _divergences_of_the_package() -> dict[str, type[Divergence]]:
    """By name, wherever they are defined and whether they are exported or not."""
    for module in pkgutil.walk_packages(objectives.__path__, objectives.__name__ + "."):
        importlib.import_module(module.name)
    return {
        kind.__name__: kind
        for kind in _subclasses(Divergence)
        if kind.__module__.startswith(objectives.__name__ + ".")
        # Not of an example in a docstring.
        and vars(sys.modules[kind.__module__]).get(kind.__name__) is kind
    }


_ALL = _divergences_of_the_package()
# It takes advantages, reads no teacher and is of no use alone: it has tests of its own, and is
# described with rewards.
_LISTED = sorted(set(_ALL) - {PolicyGradient.__name__})


def test_each_is_exported():
    missing = [name for name, kind in _ALL.items() if getattr(objectives, name, None) is not kind]
    assert missing == [], "export it in objectives/__init__.py"


@pytest.mark.parametrize("name", _LISTED)
def test_each_is_in_the_table_that_tests_run_over(name):
    """With an instance and a definition in float64, without which those tests fail."""
    assert name in {type(divergence).__name__ for divergence in EVERY}, (
        f"{name} is in no test: add an instance to STRICT_OTHERS or OTHERS of "
        "tests/divergence_references.py, and its float64 definition to _np_value"
    )


def _documented_rows() -> dict[str, str]:
    """The rows of the first table of docs/objectives.md by the divergence that each is of."""
    lines = _DOCUMENT.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next(number for number in range(start, len(lines)) if not lines[number])
    rows = [re.match(r"\| `@\w+\.(\w+)\(\)` \|", line) for line in lines[start + 2 : end]]
    assert None not in rows, "a row does not begin with a divergence as gin names it"
    names = [match[1] for match in rows if match]
    assert len(names) == len(set(names))
    return dict(zip(names, lines[start + 2 : end], strict=True))


def test_the_documents_table_is_of_the_packages_divergences():
    assert sorted(_documented_rows()) == _LISTED


@pytest.mark.parametrize("name", _LISTED)
def test_docstring_and_document_cite_the_same_papers(name):
    papers = r"arXiv (\d{4}\.\d{5})"
    in_document = set(re.findall(papers, _documented_rows().get(name, "")))
    assert set(re.findall(papers, _ALL[name].__doc__ or "")) == in_document
