"""The Colab notebook: executed from top to bottom, with few steps."""

import os
import pathlib

import pytest

NOTEBOOK = pathlib.Path(__file__).parent.parent / "launch" / "colab" / "gkd_quickstart.ipynb"


def test_the_notebook_is_one_and_was_executed():
    """Its outputs are shown to who only reads it."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    numbers = [cell.execution_count for cell in cells]
    assert numbers == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "% exact answers" in text
    assert "distilled" in text
    # Nothing of the machine that it was run on.
    assert str(pathlib.Path.home()) + os.sep not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("GKD_JAX_NOTEBOOK_TRIAL", "1")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert text.count("% exact answers") == 3
    # Of each of four problems: teacher, student before and after, and what is right.
    assert text.count("  teacher ") == text.count("  right ") == 4
    assert (tmp_path / "runs" / "colab" / "curves.png").stat().st_size > 1000
    assert not list(tmp_path.glob("gkd_jax_source"))
