"""Draws docs/images/capacity.svg: accuracy against the number of pairs in two recall tasks.

    python docs/figures/capacity.py

The numbers are those of docs/results/records/recall.json.
"""

from __future__ import annotations

from typing import NamedTuple

from common import look, save, table, use_style
from matplotlib.figure import Figure

# {panel: name of the table}
TABLES = {"A key gives the value": "Associative recall", "A context and a key do": "Joint recall"}
ROWS = {  # {name in the figure: row}
    "All items": "all items (Multi-Hop)",
    "Gated delta rule": "Gated delta",
    "Gated delta rule, small": "Gated delta of 12",
    "Titans": "Titans",
    "DNC": "DNC",
    "NUTM": "NUTM",
    "DMSDNC": "DMSDNC",
    "CT": "CT",
    "RM": "RM",
    "CM": "CM",
    "HPMN": "HPMN",
    "GRU": "GRU4REC of 128",
    "guess": "a guess among the stream's values",
}
GUESSING = "STM", "MIMN", "RMT", "FFM"  # their lines cover each other and the GRU's
LABELS = {
    "All items": "All items (grows)",
    "CT": "CT (1,280 and 1,408)",  # it keeps a segment, and segments differ between the tasks
    "guess": "A guess among the values",
}


class Curve(NamedTuple):
    """One memory.

    Attributes:
      size: numbers in the state of one stream; None where it grows, or there is none.
      accuracy: {number of pairs: test accuracy}.
    """

    size: int | None
    accuracy: dict[int, float]


def curves(part: str = "Associative recall") -> dict[str, Curve]:
    """The curve of each row of `ROWS` and `GUESSING` in a table of the record."""
    rows, made = table("recall", part, "memory"), {}
    for name, row in ({name: name for name in GUESSING} | ROWS).items():
        (numbers,) = rows[row]
        size = numbers.get("numbers in the state")
        heads = {key: key.split()[0] for key in numbers}
        accuracy = {int(heads[key]): numbers[key] for key in numbers if heads[key].isdigit()}
        made[name] = Curve(None if size is None else int(size), accuracy)
    return made


def draw() -> Figure:
    """Draws a panel for each task, and a line for each memory."""
    figure = Figure(figsize=(10, 4.5))
    panels = figure.subplots(1, len(TABLES), sharey=True)
    panels[0].set_ylabel("test accuracy")
    panels[0].plot([], [], label=", ".join(GUESSING), **look("others"))
    for axes, (title, part) in zip(panels, TABLES.items(), strict=True):
        for name, curve in curves(part).items():
            x, y = zip(*curve.accuracy.items(), strict=True)
            shown = name in ROWS and axes is panels[0]
            kind = name if name in ROWS else "others"
            label = LABELS.get(name) or f"{name} ({curve.size:,})"
            axes.plot(x, y, label=label if shown else "_", **look(kind))
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, map(str, x))
        axes.set(xlabel="pairs in the stream", ylim=(0, 1.04), title=title)
    figure.legend(loc="outside right center", title="memory (numbers in its state)")
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "capacity"))
