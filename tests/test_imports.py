"""The floors: imports go strictly down, and heavy packages come only when they are needed."""

import ast
import os
import pathlib
import statistics
import subprocess
import sys

import pytest
import structure

_ROOT = pathlib.Path(__file__).parent.parent / "gkd_jax"

# The rooms from the bottom up: each imports only what is on a lower floor.
_FLOORS = (
    ("common",),
    (
        "data",
        "models",
        "objectives",
    ),
    (
        "devices",
        "sampling",
    ),
    (
        "checkpoints",
        "distillation",
    ),
    (
        "experiment",
        "t5x_trainer",
    ),
    ("training",),
    ("run_modes",),
    ("main",),
)
_FLOOR = {room: floor for floor, rooms in enumerate(_FLOORS) for room in rooms}
_GRAPH = structure.graph_of(_ROOT)
_GIN_FILES = "experiment.gin_files"

_MODULES = sorted(filter(None, _GRAPH))

_LAZY = {
    "tensorflow",
    "seqio",
    "tensorflow_datasets",
    "sentencepiece",
    "sacrebleu",
    "rouge_score",
    "matplotlib",
    "tensorboard",
    "t5x",
    "huggingface_hub",
    "tokenizers",
    "transformers",
    "torch",
    "peft",
}

# T5X starts it, so T5X is there: what it and T5X's own libraries define, it is made of.
_OF_T5X = "t5x_trainer"
_T5X = {"t5x", "clu"}


def _tree(module: str) -> ast.Module:
    path = _ROOT / module.replace(".", os.sep)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text())


def _imported(node: ast.AST) -> list[str]:
    """Full names of what an import statement may import; relative imports are not used."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not used here"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _top_level(tree: ast.Module) -> list[ast.AST]:
    """Statements that run when the module is imported (not those for type checkers)."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not is_function and not is_for_types:
            waiting.extend(ast.iter_child_nodes(node))
    return found


def test_every_room_has_a_floor():
    assert set(map(structure.room_of, _MODULES)) == set(_FLOOR)
    assert len(_FLOOR) <= 14


@pytest.mark.parametrize("room", sorted(_FLOOR))
def test_imports_between_rooms_go_down(room):
    above = [
        f"{module} imports {imported}"
        for module in _MODULES
        if structure.room_of(module) == room
        for imported in _GRAPH[module]
        if imported
        and structure.room_of(imported) != room
        and _FLOOR[structure.room_of(imported)] >= _FLOOR[room]
    ]
    assert above == []


def test_no_files_import_each_other_in_a_circle():
    assert structure.circles_of(_GRAPH) == []


@pytest.mark.parametrize("module", _MODULES)
def test_what_is_imported_exists(module):
    names = [name for node in ast.walk(_tree(module)) for name in _imported(node)]
    own = [name.removeprefix("gkd_jax.") for name in names if name.startswith("gkd_jax.")]
    rooms = {structure.room_of(name) for name in own}
    assert rooms <= set(_FLOOR), "a former name"


def test_every_room_says_what_it_is_for():
    for path in _ROOT.glob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(docstring.splitlines()) >= 3, path


@pytest.mark.parametrize("module", _MODULES)
def test_who_may_import_what(module):
    tree = _tree(module)
    packages = {name.split(".")[0] for node in ast.walk(tree) for name in _imported(node)}
    package = structure.room_of(module)
    if not module.startswith(_GIN_FILES):
        assert "gin" not in packages, f"only {_GIN_FILES} imports gin"
    if package != "checkpoints":
        assert "orbax" not in packages, "only checkpoints/ imports Orbax"
        assert "tensorstore" not in packages, "only checkpoints/ imports TensorStore"
    if package != "data":
        assert not packages & {"tensorflow", "seqio", "tensorflow_datasets"}
    top = {name.split(".")[0] for node in _top_level(tree) for name in _imported(node)}
    if package == _OF_T5X:
        top -= _T5X
    else:
        assert not packages & _T5X, f"only {_OF_T5X} imports T5X and what comes with it"
        rooms = set(map(structure.room_of, filter(None, _GRAPH[module])))
        assert _OF_T5X not in rooms, f"T5X alone uses {_OF_T5X}"
    assert not top & _LAZY, "to be imported within the function that needs it"


@pytest.mark.parametrize("module", _MODULES)
def test_meshes_and_shardings_are_built_in_their_modules_only(module):
    if module in ("devices.mesh", "devices.partitioning", "devices.stacked_layers"):
        return
    built = [
        f"{module}:{node.lineno}"
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("Mesh", "NamedSharding", "make_mesh")
    ]
    assert built == []


def _run(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_CORE = [
    m
    for m in _MODULES
    if structure.room_of(m) not in ("main", _OF_T5X) and not m.startswith(_GIN_FILES)
]


def test_the_core_imports_no_heavy_package():
    modules = "\n".join(f"import gkd_jax.{module}" for module in _CORE)
    program = f"import sys\nimport gkd_jax\n{modules}\nprint(*sys.modules)"
    loaded = {name.split(".")[0] for name in _run(program).split()}
    assert loaded & (_LAZY | {"gin", "torch"}) == set()


@pytest.mark.slow
def test_importing_takes_less_than_two_seconds_more_than_jax():
    """What a Python user imports for a whole run.

    Processor time, and the median of three, since other programs share the machine.
    """
    program = """
import time
import jax
start = time.process_time()
import gkd_jax
from gkd_jax import experiment
from gkd_jax.run_modes import train
print(time.process_time() - start)
"""
    assert statistics.median(float(_run(program)) for _ in range(3)) < 2.0


def test_no_room_exports_a_name_that_one_of_its_modules_has():
    """Importing the module would put it in the place of what is exported."""
    for path in _ROOT.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS":
                exports = ast.literal_eval(node.value)
                names = {name for several in exports.values() for name in several}
                assert names.isdisjoint(other.stem for other in path.parent.iterdir()), path
                for module, several in exports.items():
                    file = path.parent.joinpath(*module.split(".")).with_suffix(".py")
                    text = file.read_text()
                    defined = set(structure.names_defined(ast.parse(text)))
                    assert set(several) <= defined, (path, module)
