"""Draws docs/images/forgetting.svg: what is left of an item, by the age of the item.

    python docs/figures/measure.py recall     # makes data/recall.json
    python docs/figures/forgetting.py

The numbers of the right panel, and the guess, are those of docs/results/records.
"""

from __future__ import annotations

import numpy as np
from capacity import curves
from common import look, read, save, table, use_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CHANCE, AGES = 1 / 80, 6  # the world has 80 facts, and a stream has 6 segments
SHOWN = "DNC", "Gated delta rule, small", "RM", "Last 8 items"


def draw() -> Figure:
    """Draws both panels."""
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    recalled(left)
    rehearsed(right)
    return figure


def recalled(axes: Axes) -> None:
    """Draws the accuracy of recall by the number of later pairs, in streams of 16 pairs."""
    runs = read("recall")
    for name in SHOWN:
        accuracy, size = runs[name]["by_age"], runs[name]["state_floats"]
        label = name.replace(", small", "") + (f" ({size:,})" if size else " (ids)")
        axes.plot(np.arange(len(accuracy)), accuracy, label=label, **look(name))
    guess = curves()["guess"].accuracy[16]
    axes.axhline(guess, label="a guess among the values", color="#57606a", linestyle=":")
    axes.set(xlabel="later pairs (0: the latest pair)", ylabel="test accuracy", ylim=(0, 1.04))
    axes.set_title("Recall of a pair, by its age")
    axes.legend(
        title="memory (numbers in its state)",
        alignment="left",
        fontsize=9,
        loc="lower right",
        bbox_to_anchor=(1, 0.12),
    )


def rehearsed(axes: Axes) -> None:
    """Draws what a new decoder recalls of fragments, with and without rehearsal in training."""
    probe = table("cm1", "Recollection by age", "recollection at age")
    looks = {"CM, full": ("o", "-", "with rehearsal"), "CM, only reason": ("D", "--", "without")}
    for name, (marker, line, label) in looks.items():
        values = [probe[name][0][str(age)] for age in range(AGES)]
        colour = look("CM" if line == "--" else "RM")["color"]
        axes.plot(
            np.arange(len(values)), values, marker=marker, linestyle=line, color=colour, label=label
        )
    axes.axhline(CHANCE, color="#57606a", linestyle=":", label="chance")
    axes.set(xlabel="age of the fragment, in segments", ylabel="recollection", ylim=(0, 0.08))
    axes.set_title("Rehearsal keeps old segments")
    axes.legend(title="Continual Memory", alignment="left")


if __name__ == "__main__":
    use_style()
    print(save(draw(), "forgetting"))
