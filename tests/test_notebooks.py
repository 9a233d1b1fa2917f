"""Every notebook runs from top to bottom, and shows its pictures."""

from __future__ import annotations

import nbclient
import nbformat
import pytest

from tests import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


OFTEN = [
    pytest.param(p, marks=() if p.stem == "quickstart" else pytest.mark.slow, id=p.stem)
    for p in NOTEBOOKS
]


@pytest.mark.parametrize("path", OFTEN)
def test_a_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=path.parent)
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)
