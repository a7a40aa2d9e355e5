"""Prints how the package is laid out: rooms, floors, imports between rooms, circles, what is long.

    python tests/structure.py [CHECKOUT]

A room is an entry of `gkd_jax/`: a folder or a module. An arrow is an import, anywhere in a module,
but for those that only type checkers see. A room's floor is one above the highest that it imports.
"""

import argparse
import ast
import pathlib
from collections.abc import Iterator

NUM_LONGEST = 10


def modules(package: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every module's name within the package, '' for the package's own, and its file."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip("."): path
        for path in sorted(package.rglob("*.py"))
    }


def room_of(module: str) -> str:
    """The entry of the package that a module is in."""
    return module.split(".")[0]


def imported(tree: ast.AST, known: dict[str, pathlib.Path], package: str) -> set[str]:
    """The modules of `known` that a module imports."""
    found = set()
    for node in running_statements(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            inner = name.removeprefix(f"{package}.") if name.startswith(f"{package}.") else ""
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            if inner:
                found.add(inner)
    return found


def running_statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those within `if TYPE_CHECKING:`."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def names_defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module's own statements define; not those that it imports."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target)


def graph_of(package: pathlib.Path) -> dict[str, set[str]]:
    """Module to the modules that it imports."""
    known = modules(package)
    return {
        name: imported(ast.parse(path.read_text()), known, package.name) - {name}
        for name, path in known.items()
    }


def graph_of_rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Room to the rooms that it imports."""
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        if module:
            room = room_of(module)
            rooms.setdefault(room, set()).update({room_of(t) for t in targets} - {room})
    return rooms


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's algorithm over paths)."""
    reached = {node: _reach(graph, node) for node in graph}
    groups = {
        tuple(sorted({other for other in reached[node] if node in reached[other]}))
        for node in graph
        if node in reached[node]
    }
    return sorted(map(list, groups))


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(graph.get(node, ()))
    return seen


def floors_of(rooms: dict[str, set[str]]) -> dict[str, int]:
    """Room to its floor, 1 for what imports no other room; rooms of a circle are left out."""
    in_circle = {room for circle in circles_of(rooms) for room in circle}
    floors: dict[str, int] = {}
    waiting = [room for room in rooms if room not in in_circle]
    while waiting:
        ready = [room for room in waiting if rooms[room] - in_circle <= floors.keys()]
        for room in ready:
            below = [floors[other] for other in rooms[room] if other in floors]
            floors[room] = 1 + max(below, default=0)
        waiting = [room for room in waiting if room not in floors]
    return floors


def lengths_of(package: pathlib.Path) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Lines of modules, and of functions, longest first."""
    long_modules, long_functions = [], []
    for name, path in modules(package).items():
        text = path.read_text()
        long_modules.append((len(text.splitlines()), name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                long_functions.append((node.end_lineno - node.lineno + 1, f"{name}:{node.name}"))
    return sorted(long_modules, reverse=True), sorted(long_functions, reverse=True)


def describe(package: pathlib.Path) -> str:
    """Describes a package's layout in lines of text."""
    graph = graph_of(package)
    rooms = graph_of_rooms(graph)
    floors = floors_of(rooms)
    arrows = sum(map(len, rooms.values()))
    lines = [
        f"entries at the top: {len(rooms)}",
        f"floors: {max(floors.values())}",
        f"arrows between rooms: {arrows}",
        f"arrows between modules: {sum(map(len, graph.values()))}",
        f"circles of modules: {circles_of(graph) or 'none'}",
        f"circles of rooms: {circles_of(rooms) or 'none'}",
    ]
    for floor in range(max(floors.values()), 0, -1):
        lines.append(f"floor {floor}: {' '.join(sorted(r for r in floors if floors[r] == floor))}")
    for what, found in zip(("modules", "functions"), lengths_of(package), strict=True):
        lines.append(f"longest {what}:")
        lines += [f"  {length:4} {name}" for length, name in found[:NUM_LONGEST]]
    return "\n".join(lines)


def main() -> None:
    """Prints the layout of a checkout's package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(__file__).parent.parent
    parser.add_argument("checkout", nargs="?", type=pathlib.Path, default=default)
    print(describe(parser.parse_args().checkout / "gkd_jax"))


if __name__ == "__main__":
    main()
