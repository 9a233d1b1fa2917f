"""Draws docs/images/long_streams.svg: the accuracy on early and later evidence, by segments.

    python docs/figures/long_streams.py

The numbers are those of docs/results/records/long_streams.json.
"""

from __future__ import annotations

from common import RECORDS, save, use_style
from matplotlib.figure import Figure

from rmjax.tools import ledger

PARTS = {"early": "Evidence in the first tenth", "later": "Evidence in the last tenth"}
# colour, line, and a factor that draws the seeds of the two rows side by side
ROWS = {"with rehearsal": ("#0550ae", "-", 1.03), "without rehearsal": ("#57606a", "--", 0.97)}


def draw() -> Figure:
    """Draws a panel for each place of the evidence: means as lines, and a dot for each seed."""
    tables = ledger.read(RECORDS / "long_streams.json")["tables"]
    worlds = {
        int(name.removeprefix("T = ")): {str(row["row"]): row for row in table["rows"]}
        for table in tables
        if (name := table.get("name", "")).startswith("T = ")
    }
    figure = Figure(figsize=(10, 4))
    for axes, (part, title) in zip(figure.subplots(1, 2, sharey=True), PARTS.items(), strict=True):
        for name, (colour, line, beside) in ROWS.items():
            cells = [rows[name][part] for rows in worlds.values()]
            means = [ledger.mean(cell) for cell in cells]
            axes.plot([*worlds], means, label=name, color=colour, linestyle=line)
            for at, cell in zip(worlds, cells, strict=True):
                seeds = cell["values"]
                axes.scatter([at * beside] * len(seeds), seeds, s=14, color=colour, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xticks([*worlds], [str(segments) for segments in worlds])
        axes.minorticks_off()
        axes.set(xlabel="segments of the stream", ylabel="test accuracy", ylim=(0.6, 1))
        axes.set_title(title)
    figure.axes[0].legend(loc="lower left")
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "long_streams"))
