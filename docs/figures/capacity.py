"""Draws docs/images/capacity.svg: accuracy against the number of pairs in associative recall.

    python docs/figures/capacity.py

The numbers are in data/capacity.json. Each row has the flags of its run, which follow
`python -m rmjax.main --unread=warn --config=configs/recall.py:local --workdir=W`.
"""

from __future__ import annotations

from common import beside, look, read, save, use_style
from matplotlib.figure import Figure


def draw() -> Figure:
    """Draws one line for each memory."""
    data = read("capacity")
    pairs = data.pop("pairs")
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for name, row in data.items():
        size = row["state_floats"]
        label = name if size is None else f"{name} ({size:,})"
        label = {"All items": "All items (grows)", "guess": "A guess among the values"}.get(
            name, label
        )
        axes.plot(pairs, row["accuracy"], label=label, **look(name))
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, map(str, pairs))
    axes.set(xlabel="pairs in the stream", ylabel="test accuracy", ylim=(0, 1.04))
    axes.set_title("How many pairs does a memory hold?")
    beside(axes, title="memory (numbers in its state)", alignment="left")
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "capacity"))
