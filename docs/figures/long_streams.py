"""Draws docs/images/long_streams.svg: the accuracy on early and later evidence, by segments.

    python docs/figures/long_streams.py

The numbers are those of docs/results/records/long_streams.json.
"""

from __future__ import annotations

from common import RECORDS, save, use_style, with_bars
from matplotlib.figure import Figure

from rmjax.tools import ledger

CHANCE = 1 / 4  # the queries of the world have four answers
PARTS = {"early": "Evidence in the first tenth", "later": "Evidence in the last tenth"}
ROWS = {"with rehearsal": ("#0550ae", "o", "-"), "without rehearsal": ("#57606a", "D", "--")}


def draw() -> Figure:
    """Draws a panel for each place of the evidence, with a line for each row."""
    tables = ledger.read(RECORDS / "long_streams.json")["tables"]
    worlds = {
        int(name.removeprefix("T = ")): {str(row["row"]): row for row in table["rows"]}
        for table in tables
        if (name := table.get("name", "")).startswith("T = ")
    }
    figure = Figure(figsize=(10, 4))
    for axes, (part, title) in zip(figure.subplots(1, 2, sharey=True), PARTS.items(), strict=True):
        for name, look in ROWS.items():
            cells = [(float(segments), rows[name][part]) for segments, rows in worlds.items()]
            with_bars(axes, name, [(at, x) for at, x in cells if not isinstance(x, str)], look)
        axes.axhline(CHANCE, color="#57606a", linestyle=":", label="chance")
        axes.set_xscale("log")
        axes.set_xticks([*worlds], [str(segments) for segments in worlds])
        axes.minorticks_off()
        axes.set(xlabel="segments of the stream", ylabel="test accuracy", ylim=(0, 1.04))
        axes.set_title(title)
    figure.axes[0].legend(loc="lower left", bbox_to_anchor=(0, 0.3))
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "long_streams"))
