"""Draws docs/images/state_size.svg: accuracy at 16 pairs against the numbers in the state.

    python docs/figures/measure.py recall     # makes data/recall.json
    python docs/figures/state_size.py

The single points are those of docs/results/records/recall.json.
"""

from __future__ import annotations

from capacity import curves
from common import beside, look, read, save, use_style
from matplotlib.figure import Figure

SWEEPS = {"Gated delta rule": "d = 6 to 24, one head", "RM": "K = 4 to 32"}
SINGLE = "CM", "GRU", "DNC"
TICKS = 64, 128, 256, 512, 1024


def points(kind: str) -> list[tuple[int, float]]:
    """(numbers in the state, accuracy at 16 pairs) of the runs of a kind, by size."""
    runs = read("recall")
    chosen = [run for name, run in runs.items() if name.split(",")[0] == kind]
    return sorted((run["state_floats"], run["pairs"]["16 pairs"]) for run in chosen)


def draw() -> Figure:
    """Draws a line for each sweep, and a point for each other memory."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for kind, sizes in SWEEPS.items():
        x, y = zip(*points(kind), strict=True)
        axes.plot(x, y, label=f"{kind}, {sizes}", **look(kind))
    known = curves()
    for name in SINGLE:
        style = look(name) | {"linestyle": ""}
        axes.plot([known[name].size], [known[name].accuracy[16]], label=name, **style)
    guess = known["guess"].accuracy[16]
    axes.axhline(guess, label="a guess among the values", color="#57606a", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(TICKS, map(str, TICKS))
    axes.set(xlabel="numbers in the state of one stream", ylabel="test accuracy, 16 pairs")
    axes.set_ylim(0, 1.04)
    axes.set_title("What a larger state buys")
    beside(axes)
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "state_size"))
