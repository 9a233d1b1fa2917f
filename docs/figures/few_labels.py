"""Draws docs/images/few_labels.svg: the test AUC of clicks by the number of labels.

    python docs/figures/few_labels.py

The numbers are those of docs/results/records/few.json. A label is one positive and one negative
question.
"""

from __future__ import annotations

from common import RECORDS, save, use_style
from matplotlib.figure import Figure

from rmjax.tools import ledger

# {name of the setting: labels a user, on average}
LABELS = {"1 for 5 % of users": 0.05, "1 for 20 % of users": 0.2}
LABELS |= {f"{number} a user": float(number) for number in (1, 2, 4, 8)}
ROWS = {
    "with rehearsal": ("#0550ae", "o", "-"),
    "rehearsal first": ("#d9730d", "s", "-"),
    "without rehearsal": ("#57606a", "D", "--"),
}


def draw() -> Figure:
    """Draws a line for each row: means, and a bar of one standard deviation over seeds."""
    measured: dict[str, list[tuple[float, float, float]]] = {row: [] for row in ROWS}
    tables = {table.get("name"): table for table in ledger.read(RECORDS / "few.json")["tables"]}
    known = [setting for setting in LABELS if setting in tables]
    for setting in known:
        for row in tables[setting]["rows"]:
            name, cell = str(row["row"]), row["auc"]
            if name in ROWS and not isinstance(cell, str):  # an oracle has no line
                middle, std = ledger.mean(cell), ledger.std(cell)
                assert middle is not None
                measured[name].append((LABELS[setting], middle, std or 0.0))
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, points in measured.items():
        if points:
            labels, middle, std = zip(*sorted(points), strict=True)
            colour, marker, line = ROWS[name]
            axes.plot(labels, middle, label=name, color=colour, marker=marker, linestyle=line)
            axes.errorbar(labels, middle, std, fmt="none", ecolor=colour, capsize=3)
    axes.set_xscale("log")
    axes.set_xticks([LABELS[setting] for setting in known], [f"{LABELS[s]:g}" for s in known])
    axes.minorticks_off()
    axes.set(xlabel="labels a user, on average", ylabel="test AUC")
    axes.set_title("Few labels: what rehearsal adds")
    axes.legend()
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "few_labels"))
