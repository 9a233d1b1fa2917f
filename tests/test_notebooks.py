"""Every notebook runs from top to bottom, shows images, and prints no warnings.

The stored notebooks have their outputs. Notebooks that train run here at tiny sizes: another value
replaces that of the cell with the tag `parameters`.
"""

from __future__ import annotations

import re

import nbclient
import nbformat
import pytest

from tests import ROOT

TINY = {
    "language": "STEPS, WATCHED = 1, 24",
    "recommender": "USERS, ITEMS, STEPS = 60, 40, 2",
    "research": "DIMS, STEPS = (8,), 2",
}
SLOW = {"language", "memoria"}  # 25 s of CPU time each, mostly to compile
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = [
    pytest.param(path, marks=pytest.mark.slow if path.stem in SLOW else (), id=path.stem)
    for path in PATHS
]
MOST_BYTES = 300_000
A_PATH = re.compile(r"(?<![\w.])/(work|tmp|home|root|usr|var|Users)/")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def has_image(output):
    return "image/png" in output.get("data", {})


@pytest.mark.parametrize("path", RUN)
def test_a_notebook_runs_and_shows_an_image(path):
    notebook = nbformat.read(path, as_version=4)
    if path.stem in TINY:
        (place,) = [
            n
            for n, cell in enumerate(notebook.cells)
            if "parameters" in cell.metadata.get("tags", ())
        ]
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(TINY[path.stem]))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=path.parent)
    outputs = outputs_of(notebook)
    assert any(has_image(output) for output in outputs)
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_stored_notebook_has_the_outputs_of_one_run(path):
    notebook = nbformat.read(path, as_version=4)
    cells, outputs = code_cells(notebook), outputs_of(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run it from top to bottom, and store it"
    assert any(has_image(output) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_stored_notebook_names_no_folder_of_a_machine(path):
    texts = [
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for output in outputs_of(nbformat.read(path, as_version=4))
    ]
    assert not [text for text in texts if A_PATH.search(text)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_figure_of_a_notebook_has_an_alternative_text(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        if any(has_image(output) for output in cell.outputs):
            text = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(text.split()) > 5, "set metadata mystnb.image.alt of: " + cell.source
