"""Draws docs/images/capacity.svg: accuracy against the number of pairs in associative recall.

    python docs/figures/capacity.py

The numbers are those of docs/results/records/recall.json.
"""

from __future__ import annotations

from typing import NamedTuple

from common import beside, look, save, table, use_style
from matplotlib.figure import Figure

PAIRS = 2, 4, 8, 16
ONE_TABLE, SOLVED = "One table of memories", "Settings that solve it"
# {name in the figure: (table, row, which of the rows of this name)}
ROWS = {
    "All items": (ONE_TABLE, "all items (Multi-Hop)", 0),
    "Gated delta rule": (SOLVED, "gated_delta", 0),
    "DNC": (SOLVED, "dnc", 0),
    "Gated delta rule, small": (SOLVED, "gated_delta", 1),
    "RM": (ONE_TABLE, "RM, softmax over items, slot identity", 0),
    "CM": (ONE_TABLE, "CM", 0),
    "GRU": (ONE_TABLE, "GRU of 128", 0),
    "guess": (ONE_TABLE, "a guess among the stream's values", 0),
}
LABELS = {"All items": "All items (grows)", "guess": "A guess among the values"}


class Curve(NamedTuple):
    """One memory.

    Attributes:
      size: numbers in the state of one stream; None where it grows, or there is none.
      accuracy: at each number of `PAIRS`.
    """

    size: int | None
    accuracy: list[float]


def curves() -> dict[str, Curve]:
    """The curve of each row of `ROWS`."""
    tables = {part: table("recall", part, "memory") for part in (ONE_TABLE, SOLVED)}
    made = {}
    for name, (part, row, place) in ROWS.items():
        numbers = dict(tables[part][row][place])
        size = numbers.pop("numbers in the state", None)
        by_pairs = {int(key.split()[0]): value for key, value in numbers.items()}
        accuracy = [by_pairs[pairs] for pairs in PAIRS]
        made[name] = Curve(None if size is None else int(size), accuracy)
    return made


def draw() -> Figure:
    """Draws one line for each memory."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for name, curve in curves().items():
        label = LABELS.get(name) or f"{name} ({curve.size:,})"
        axes.plot(PAIRS, curve.accuracy, label=label, **look(name))
    axes.set_xscale("log", base=2)
    axes.set_xticks(PAIRS, map(str, PAIRS))
    axes.set(xlabel="pairs in the stream", ylabel="test accuracy", ylim=(0, 1.04))
    axes.set_title("How many pairs does a memory hold?")
    beside(axes, title="memory (numbers in its state)", alignment="left")
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "capacity"))
