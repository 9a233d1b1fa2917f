"""Every notebook runs from top to bottom, shows images, and prints no warnings."""

from __future__ import annotations

import nbclient
import nbformat
import pytest

from tests import ROOT

NOTEBOOKS = [
    pytest.param(path, marks=() if path.stem == "quickstart" else pytest.mark.slow, id=path.stem)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_runs_and_shows_an_image(path):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=path.parent)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)
