"""Puts each known fault into a copy of the project and shows the test that then fails.

    python tests/faults/run.py [NUMBER ...]

`NN_name.patch` is the fault of pitfall NN: a small diff against the tree. The tests that carry
`@pytest.mark.pitfall(NN)` must pass without it and fail with it. Ends with a table, and with
status 1 if a fault went unnoticed or its patch no longer applies.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COPIED = ("gkd_jax", "tests", "gin_configs", "examples", "pyproject.toml")


def tests_of(number: int) -> list[str]:
    """Finds the ids of the tests that carry the pitfall's marker, by reading the sources."""
    marker = re.compile(
        rf"@pytest\.mark\.pitfall\([^)]*\b{number}\b[^)]*\)(?:\s*@[^\n]*)*\s*def (test_\w+)"
    )
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names = marker.findall(path.read_text())
        found += [f"{path.relative_to(ROOT)}::{name}" for name in names]
    return found


def run_with_fault(patch: pathlib.Path, tests: list[str]) -> tuple[bool, list[str]]:
    """Returns whether the patch applied, and the tests that failed under it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, copy / name)
        applied = subprocess.run(
            ["git", "apply", "--recount", str(patch)], cwd=copy, capture_output=True, text=True
        )
        if applied.returncode != 0:
            return False, [applied.stderr.strip()]
        environment = dict(os.environ, PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, flags=re.MULTILINE)
        return True, failed


def main(arguments: list[str]) -> int:
    wanted = {int(argument) for argument in arguments}
    rows, unnoticed = [], 0
    for patch in sorted(HERE.glob("*.patch")):
        number = int(patch.name.split("_")[0])
        if wanted and number not in wanted:
            continue
        tests = tests_of(number)
        applied, failed = run_with_fault(patch, tests) if tests else (True, [])
        if not applied:
            verdict = f"PATCH DOES NOT APPLY: {failed[0]}"
        elif not failed:
            verdict = f"UNNOTICED by {len(tests)} tests"
        else:
            verdict = failed[0]
        unnoticed += not (applied and failed)
        rows.append(f"{patch.stem}: {verdict}")
        print(rows[-1], flush=True)
    print(f"{len(rows) - unnoticed} of {len(rows)} faults made a test fail")
    return 1 if unnoticed or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
