"""Runs notebooks, and stores them with their outputs.

    python docs/figures/store.py recommender language     # some of notebooks/*.ipynb

Figures are stored with a palette of 128 colours, which makes them a third as large.
"""

from __future__ import annotations

import base64
import io
import sys
from typing import Any

import nbclient
import nbformat
from from_notebooks import NOTEBOOKS
from PIL import Image

COLOURS = 128
SECONDS = 1800  # the longest run of a cell


def shrink(png: str) -> str:
    """A PNG file in base64, with a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


def tidy(notebook: Any) -> None:
    """Shrinks the figures of a notebook, and removes what depends on the version of Python."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = shrink(data["image/png"])
    notebook.metadata["language_info"] = {"name": "python"}


def main() -> None:
    """Runs and stores the notebooks that the command line names."""
    for name in sys.argv[1:]:
        path = NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", record_timing=False
        )
        client.execute(cwd=NOTEBOOKS)
        tidy(notebook)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
