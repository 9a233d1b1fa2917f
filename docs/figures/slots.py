"""Draws docs/images/slots.svg: how much each segment of a user's clicks changes each slot.

python docs/figures/measure.py clicks     # makes data/clicks.json
python docs/figures/slots.py
"""

from __future__ import annotations

import numpy as np
from common import read, save, use_style
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

COLOURS = "#0550ae", "#d9730d", "#2da44e", "#8250df", "#cf222e", "#54aeff", "#e3b341", "#1b7c83"
BROWSING = "#d0d7de"


def draw() -> Figure:
    """Draws the interest of each visit above the change of each slot at each segment."""
    data = read("clicks")
    count, change = data["interests"], np.array(data["change"]).T  # [K, T]
    visits = np.minimum(data["visit_interest"], count)
    figure = Figure(figsize=(10, 5))
    top, heat = figure.subplots(2, 1, sharex=True, height_ratios=(1, 5))
    colours = ListedColormap([*COLOURS[:count], BROWSING])
    segments = change.shape[1]
    top.imshow(
        visits[None], aspect="auto", cmap=colours, vmin=-0.5, vmax=count + 0.5,
        extent=(0, segments, 0, 1), interpolation="nearest",
    )  # fmt: skip
    top.set(yticks=[], ylabel="visits")
    top.set_title("A user's visits, by interest (grey: browsing)")
    order = np.argsort(-(change @ np.arange(segments)) / change.sum(1), kind="stable")
    image = heat.imshow(
        change[order], aspect="auto", extent=(0, segments, change.shape[0], 0), vmin=0,
        interpolation="nearest",
    )  # fmt: skip
    heat.set(xlabel="segment of 20 clicks", ylabel="slot", yticks=[])
    heat.set_title("How much each segment changes each slot")
    figure.colorbar(image, ax=[top, heat], label="change of the slot", shrink=0.8)
    for axes in (top, heat):
        axes.grid(False)
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "slots"))
