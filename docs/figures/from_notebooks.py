"""Copies figures of the stored notebooks to docs/images, for the gallery.

python docs/figures/from_notebooks.py
"""

from __future__ import annotations

import base64
import json

from common import HERE, IMAGES

NOTEBOOKS = HERE.parents[1] / "notebooks"
# {name in docs/images: (notebook, which of its figures)}
FIGURES = {
    "recommender_scores": ("recommender", 0),
    "recommender_memory": ("recommender", 1),
    "language_reminded": ("language", 1),
    "language_ages": ("language", 2),
    "research_capacity": ("research", 1),
    "memoria_graph": ("memoria", 0),
}


def images(notebook: str) -> list[bytes]:
    """The figures of a stored notebook, as PNG files, in their order."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    stored = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    return [base64.b64decode("".join(text)) for text in stored]


def main() -> None:
    """Writes the files."""
    for name, (notebook, place) in FIGURES.items():
        path = IMAGES / f"{name}.png"
        path.write_bytes(images(notebook)[place])
        print(path)


if __name__ == "__main__":
    main()
