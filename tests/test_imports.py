"""The floors: imports go strictly down, and heavy packages come only when they are needed."""

import ast
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterable

import pytest

_ROOT = pathlib.Path(__file__).parent.parent / "gkd_jax"

# Floor of each module; a package's name stands for all its modules.
_FLOORS = {
    "main": 5,
    "gin_utils": 5,
    "gin_reader": 5,
    "gin_walk": 5,
    "gin_text": 5,
    "t5x_trainer": 5,
    "train": 4,
    "evaluate": 4,
    "generate": 4,
    "store_teacher": 4,
    "export": 4,
    "interruption": 4,
    "trainer": 4,
    "watchdog": 4,
    "non_finite": 4,
    "metrics_log": 4,
    "profiling": 4,
    "compile_ahead": 4,
    "compile_parts": 4,
    "compile_report": 4,
    "interactive": 4,
    "export_checks": 4,
    "hf_checks": 4,
    "study": 4,
    "dry_run": 4,
    "experiment": 4,
    "adapters": 4,
    "prepare": 4,
    "plan": 4,
    "output_checks": 4,
    "vocabulary_checks": 4,
    "store_checks": 4,
    "runtime": 4,
    "reward_scorer": 4,
    "teacher_tokens": 4,
    "plots": 4,
    "train_step": 3,
    "rewards": 3,
    "rollout": 3,
    "replay": 3,
    "supports": 3,
    "teachers": 3,
    # Tasks bring data and metrics together; data.task imports them by name when one is wanted.
    "data.recipes": 3,
    "objectives": 2,
    "sampling": 2,
    "checkpoints": 2,
    "data": 2,
    "metrics": 2,
    "models": 1,
    "partitioning": 1,
    "meshes": 0,
    "rules": 0,
    "optimizers": 1,
    "writers": 1,
    "pretrained": 1,
    # Contracts and words that others share.
    "metrics.score": 1,
    "models.base": 0,
    "models.config": 0,
    "models.decoder_config": 0,
    "models.stacking": 0,
    "hub": 0,
    "appended": 0,
    "chips": 0,
    "flops": 0,
    "hlo": 0,
    "last_step": 0,
    "hlo_loops": 0,
    "hlo_text": 0,
    "collectives": 0,
    "batch": 0,
    "array_types": 0,
}

_MODULES = sorted(
    str(path.relative_to(_ROOT).with_suffix("")).replace(os.sep, ".").removesuffix(".__init__")
    for path in _ROOT.rglob("*.py")
    if path != _ROOT / "__init__.py"
)

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


def _floor(module: str) -> int:
    while module and module not in _FLOORS:
        module = module.rpartition(".")[0]
    return _FLOORS.get(module, -1)


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


def _own_imports(module: str, nodes: Iterable[ast.AST]) -> set[str]:
    """Modules of this package that are imported by some of `module`'s statements."""
    own = set()
    for node in nodes:
        for name in _imported(node):
            if name.startswith("gkd_jax."):
                inner = name.removeprefix("gkd_jax.")
                while inner and inner not in _MODULES:
                    inner = inner.rpartition(".")[0]
                assert inner, f"{module} imports {name}, which is not a module"
                own.add(inner)
    return own


def test_every_module_has_a_floor():
    assert [module for module in _MODULES if _floor(module) < 0] == []
    named = {name for module in _MODULES for name in (module, module.split(".")[0])}
    assert set(_FLOORS) <= named, "a floor is given to a module that does not exist"


@pytest.mark.parametrize("module", _MODULES)
def test_imports_go_down(module):
    """To lower floors, or within a package; so packages of floor 2 do not know each other.

    Words, run modes and gin's modules may use others of their floor (without a circle: below).
    """
    floor = _floor(module)
    for imported in sorted(_own_imports(module, ast.walk(_tree(module)))):
        other = _floor(imported)
        is_same_package = imported.split(".")[0] == module.split(".")[0]
        if is_same_package or (floor == other and floor in (0, 4, 5)):
            continue
        assert other < floor, f"{module} (floor {floor}) imports {imported} (floor {other})"


def test_imports_have_no_circle():
    graph = {module: _own_imports(module, _top_level(_tree(module))) for module in _MODULES}
    while graph:
        imported_by_some = set().union(*graph.values())
        ends = [
            module
            for module, imported in graph.items()
            if module not in imported_by_some or not imported & set(graph)
        ]
        assert ends, f"these import each other in a circle: {sorted(graph)}"
        for module in ends:
            del graph[module]


@pytest.mark.parametrize("module", _MODULES)
def test_who_may_import_what(module):
    tree = _tree(module)
    packages = {name.split(".")[0] for node in ast.walk(tree) for name in _imported(node)}
    package = module.split(".")[0]
    if _floor(module) < 5:
        assert "gin" not in packages, "only floor 5 imports gin"
    if package != "checkpoints":
        assert "orbax" not in packages, "only checkpoints/ imports Orbax"
        assert "tensorstore" not in packages, "only checkpoints/ imports TensorStore"
    if package not in ("data", "metrics"):
        assert not packages & {"tensorflow", "seqio", "tensorflow_datasets"}
    top = {name.split(".")[0] for node in _top_level(tree) for name in _imported(node)}
    if module == _OF_T5X:
        assert "gin" not in packages, "T5X reads its gin files"
        top -= _T5X
    else:
        assert not packages & _T5X, f"only {_OF_T5X} imports T5X and what comes with it"
        assert _OF_T5X not in _own_imports(module, ast.walk(tree)), f"T5X alone uses {_OF_T5X}"
    assert not top & _LAZY, "to be imported within the function that needs it"


@pytest.mark.parametrize("module", _MODULES)
def test_meshes_and_shardings_are_built_in_their_modules_only(module):
    if module in ("meshes", "partitioning"):
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


_CORE = [module for module in _MODULES if _floor(module) < 5]


def test_the_core_imports_no_heavy_package():
    modules = "\n".join(f"import gkd_jax.{module}" for module in _CORE)
    program = f"import sys\nimport gkd_jax\n{modules}\nprint(*sys.modules)"
    loaded = {name.split(".")[0] for name in _run(program).split()}
    assert loaded & (_LAZY | {"gin", "torch"}) == set()


def test_importing_takes_less_than_two_seconds_more_than_jax():
    """What a Python user imports for a whole run.

    Processor time, and the median of three, since other programs share the machine.
    """
    program = """
import time
import jax
start = time.process_time()
import gkd_jax
from gkd_jax import experiment, train
print(time.process_time() - start)
"""
    assert statistics.median(float(_run(program)) for _ in range(3)) < 2.0
