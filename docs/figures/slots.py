"""Draws docs/images/slots.svg: what slots take in of a stream, and how a stream changes them.

python docs/figures/measure.py recall slots     # makes data/slots.json
python docs/figures/slots.py
"""

from __future__ import annotations

import string

import numpy as np
from common import read, save, use_style
from matplotlib.figure import Figure

SEGMENT = 8  # items of a segment of the recall task


def draw() -> Figure:
    """Draws both heat maps."""
    data = read("slots")
    figure = Figure(figsize=(10, 8))
    top, bottom = figure.subplots(2, 1)
    recall, clicks = data["recall"], data["clicks"]
    image = top.imshow(recall["weights"], aspect="auto", vmin=0, vmax=1)
    names = [name_of(item, recall["keys"]) for item in recall["items"]]
    top.set_xticks(range(len(names)), names, fontsize=9)
    for border in range(SEGMENT, len(names), SEGMENT):
        top.axvline(border - 0.5, color="#1f2328", linewidth=1)
    top.set(xlabel="keys (numbers) and values (letters), in segments of 8", ylabel="slot")
    top.set_title("Which item each slot takes in: a stream of 16 pairs")
    figure.colorbar(image, ax=top, label="weight in the slot")
    change = np.array(clicks["change"]).T  # [K, T]
    order = np.argsort(-change.max(1), kind="stable")
    segments = change.shape[1]
    extent = (0.5, segments + 0.5, len(change) - 0.5, -0.5)
    image = bottom.imshow(change[order], aspect="auto", extent=extent, vmin=0)
    bottom.set(xlabel="segment of 20 clicks", ylabel="slot, most changed first")
    bottom.set_title("How much each segment changes each slot: 1,000 clicks of a user")
    figure.colorbar(image, ax=bottom, label="change of the slot")
    for axes in (top, bottom):
        axes.set_yticks([])
        axes.grid(False)
    return figure


def name_of(item: int, keys: int) -> str:
    """A number for a key, a letter for a value."""
    return str(item) if item < keys else string.ascii_uppercase[item - keys]


if __name__ == "__main__":
    use_style()
    print(save(draw(), "slots"))
