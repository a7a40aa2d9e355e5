"""Documents: links resolve, and files and names of the package that they mention exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "gkd_jax"
_PATTERNS = ("*.md", "docs/**/*.md", "examples/**/README.md", "launch/**/README.md")
DOCUMENTS = sorted(path for pattern in _PATTERNS for path in ROOT.glob(pattern))
# These describe the code itself; the others are for users.
OF_THE_CODE = [path for path in DOCUMENTS if path.name == "WORKSPACE.md" or "design" in path.parts]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")


def _names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def _anchors(path):
    """The anchors of a document's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("name", _names(DOCUMENTS))
def test_links_resolve(name):
    document = ROOT / name
    for link in _LINK.findall(document.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@pytest.mark.parametrize("name", _names(OF_THE_CODE))
def test_mentioned_files_and_names_exist(name):
    """Paths are relative to the repository, the package or the tests; names are in a module."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    sources = "".join(path.read_text() for path in files)
    for code in _CODE.findall((ROOT / name).read_text()):
        path, _, attribute = code.partition(":")
        if re.fullmatch(r"[\w/]+\.(py|gin|md|sh)", path) and "/" in path:
            bases = (ROOT, PACKAGE, ROOT / "tests")
            file = next((base / path for base in bases if (base / path).exists()), None)
            assert file is not None, code
            assert attribute.strip(":") in file.read_text(), code
        elif re.fullmatch(r"\w*_\w+|\w+\.\w+", code):
            assert code.rpartition(".")[2] in sources, code


def test_the_workspaces_guide_is_short():
    assert len((ROOT / "WORKSPACE.md").read_text().splitlines()) <= 150
