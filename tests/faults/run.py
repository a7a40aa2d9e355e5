"""Puts each known fault into a copy of the project and shows the test that then fails.

    python tests/faults/run.py [NUMBER ...]

`NN_name.patch` is a fault of pitfall NN: what is wrong in words, then a small diff of `gkd_jax`;
a pitfall may have several. The tests that carry `@pytest.mark.pitfall(NN)` must notice it: one
that fails with it must pass without it. Prints a line for each fault, and ends with status 1 if
one went unnoticed or its patch no longer applies.
"""

import ast
import collections
import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COPIED = ("gkd_jax", "tests", "gin_configs", "examples", "pyproject.toml")
NOT_COPIED = shutil.ignore_patterns("__pycache__", ".jax_cache", "faults")
TIME_LIMIT_SECONDS = 900


def patches() -> list[pathlib.Path]:
    """The faults in the order of their numbers."""
    return sorted(HERE.glob("*.patch"))


def number_of(patch: pathlib.Path) -> int:
    """The pitfall that a fault is of."""
    return int(patch.name.partition("_")[0])


def marked_tests() -> dict[int, list[str]]:
    """Pitfall number to the ids of the tests that carry its marker, quick ones first.

    Reads the sources only: to import all tests takes longer than to run most of them.
    """
    found: dict[int, list[tuple[tuple[bool, bool], str]]] = collections.defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            marks = [ast.unparse(decorator) for decorator in node.decorator_list]
            cost = ("pytest.mark.slow" in marks, "import small_runs" in text)
            for mark in marks:
                if match := re.fullmatch(r"pytest\.mark\.pitfall\((\d+)\)", mark):
                    test = f"{path.relative_to(ROOT)}::{node.name}"
                    found[int(match[1])].append((cost, test))
    return {number: [test for _, test in sorted(tests)] for number, tests in found.items()}


def touched_files(patch: pathlib.Path) -> list[str]:
    """The files that a patch changes."""
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), flags=re.MULTILINE)


@contextlib.contextmanager
def copy_of_project() -> Iterator[pathlib.Path]:
    """A copy to spoil. It shares the cache of compiled programs, which are found by content."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=NOT_COPIED)
            elif source.exists():
                shutil.copy(source, copy / name)
        cache = ROOT / "tests" / ".jax_cache"
        cache.mkdir(exist_ok=True)
        (copy / "tests" / ".jax_cache").symlink_to(cache, target_is_directory=True)
        yield copy


def apply(patch: pathlib.Path, copy: pathlib.Path, *options: str) -> str:
    """Applies a patch; returns git's complaint, empty if it applied."""
    # Were the copy inside some repository, git would leave out what lies outside of it.
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(copy.parent))
    command = ["git", "apply", "--recount", *options, str(patch)]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def run_tests(
    copy: pathlib.Path, tests: Iterable[str], *options: str, time_limit: float | None = None
) -> tuple[list[str], str]:
    """Runs tests in a copy; returns the ids of those that failed, and what pytest printed."""
    environment = dict(os.environ, PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    # pyproject.toml adds one -q, which leaves the summary that is read here.
    command = [sys.executable, "-m", "pytest", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    try:
        result = subprocess.run(
            [*command, *options, *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=time_limit,
        )
    except subprocess.TimeoutExpired:
        return [], f"no end within {time_limit} seconds"
    # A module that does not even import has no '::': that is a broken patch, not a failed test.
    failed = re.findall(
        r"^(?:FAILED|ERROR) (\S+?::.+?)(?: - .*)?$", result.stdout, flags=re.MULTILINE
    )
    return failed, result.stdout + result.stderr


def try_fault(patch: pathlib.Path, tests: list[str]) -> tuple[str | None, str]:
    """Returns the test that failed, or None, and a verdict in words."""
    if not tests:
        return None, f"NO TEST carries pitfall({number_of(patch)})"
    if not all(name.startswith("gkd_jax/") for name in touched_files(patch)):
        return None, "THE PATCH CHANGES MORE THAN gkd_jax"
    with copy_of_project() as copy:
        complaint = apply(patch, copy)
        if complaint:
            return None, f"PATCH DOES NOT APPLY: {complaint.splitlines()[0]}"
        failed, printed = run_tests(copy, tests, "-x", time_limit=TIME_LIMIT_SECONDS)
    if failed:
        return failed[0], failed[0]
    last = (printed.strip().splitlines() or ["pytest printed nothing"])[-1]
    return None, f"UNNOTICED by {len(tests)} tests ({last})"


def failing_without_fault(tests: list[str]) -> list[str]:
    """Those of the tests that fail in the project as it is, and so show nothing."""
    if not tests:
        return []
    with copy_of_project() as copy:
        failed, printed = run_tests(copy, tests)
        if not failed and " passed" not in printed:
            print(printed)
            return tests
        return failed


def main(arguments: list[str]) -> int:
    """Tries the faults of these pitfalls, or all; returns the exit status."""
    wanted = {int(argument) for argument in arguments}
    chosen = [patch for patch in patches() if not wanted or number_of(patch) in wanted]
    missing = sorted(wanted - {number_of(patch) for patch in chosen})
    if missing:
        print(f"there is no fault of pitfall {', '.join(map(str, missing))} in {HERE}")
    tests = marked_tests()
    width = max((len(patch.stem) for patch in chosen), default=0)
    noticed_by: dict[str, str] = {}
    for patch in chosen:
        start = time.monotonic()
        test, verdict = try_fault(patch, tests.get(number_of(patch), []))
        if test is not None:
            noticed_by[patch.stem] = test
        print(f"{patch.stem:<{width}}  {time.monotonic() - start:5.1f} s  {verdict}", flush=True)
    for test in failing_without_fault(sorted(set(noticed_by.values()))):
        faults = [name for name, by in noticed_by.items() if by == test]
        noticed_by = {name: by for name, by in noticed_by.items() if by != test}
        print(f"FAILS WITHOUT ANY FAULT: {test}, which should show {', '.join(faults)}")
    print(
        f"{len(noticed_by)} of {len(chosen)} faults made a test fail that passes without the fault"
    )
    return 0 if chosen and not missing and len(noticed_by) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
