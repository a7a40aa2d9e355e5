"""The faults still fit the code: they apply, change the product alone, and have their tests."""

import pytest
from faults import run


@pytest.fixture(scope="module")
def copy():
    with run.copy_of_project() as folder:
        yield folder


@pytest.fixture(scope="module")
def marked():
    return run.marked_tests()


@pytest.mark.parametrize("patch", run.patches(), ids=lambda patch: patch.stem)
def test_fault_applies_and_has_tests(patch, copy, marked):
    """Whether those tests notice it is for `run.py` to show, which takes minutes."""
    assert run.apply(patch, copy, "--check") == ""
    files = run.touched_files(patch)
    assert files
    assert all(name.startswith("gkd_jax/") for name in files)
    assert run.number_of(patch) in marked
