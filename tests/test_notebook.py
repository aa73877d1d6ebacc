"""The notebooks: each one runs from top to bottom, and is committed as it is before anything ran."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'spec-recipes[dev]'")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_without_outputs(file: Path) -> None:
    """Outputs would go stale, and make every change unreadable."""
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, tmp_path: Path) -> None:
    """Every cell, in a kernel of its own: it trains, plots, and shows an answer with its accepted drafts."""
    client = pytest.importorskip("nbclient", reason="pip install 'spec-recipes[dev]'")
    notebook = nbformat.read(file, as_version=4)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/png" in shown
    assert "text/html" in shown
    assert len(list((tmp_path / "runs").iterdir())) == 3
