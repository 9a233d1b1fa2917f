"""Draws docs/images/memories.svg: accuracy on the evidence world against the bytes of a state.

    python docs/figures/memories.py

The numbers are those of docs/results/records/memories_evidence.json.
"""

from __future__ import annotations

from common import RECORDS, number, save, use_style
from matplotlib.figure import Figure

from rmjax.tools import ledger

KINDS = {  # colour and marker
    "with rehearsal": ("#0550ae", "o"),
    "fixed size, without": ("#d9730d", "s"),
    "keeps all items": ("#57606a", "D"),
}
LEFT = ("RM", "CM", "`dnc`", "`hpmn`", "`rmt`")  # points with the label at the left
BELOW = ("CM", "`compressive`", "`nutm`")  # points with the label below


def draw() -> Figure:
    """Draws a point for each memory: the mean, and a bar of one standard deviation over seeds."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for kind, (colour, marker) in KINDS.items():
        axes.plot([], [], label=kind, color=colour, marker=marker, linestyle="")
    for row in ledger.read(RECORDS / "memories_evidence.json")["tables"][0]["rows"]:
        name, accuracy = str(row["memory"]), row["accuracy"]
        if "reason only" in name:
            continue  # three points of one machine would cover each other
        size, floats = (number(row[f"{unit} state"]) for unit in ("bytes of", "numbers in the"))
        kind = "fixed size, without" if floats else "keeps all items"
        colour, marker = KINDS["with rehearsal" if name in ("RM", "CM") else kind]
        place = size, ledger.mean(accuracy)
        axes.errorbar(*place, ledger.std(accuracy) or 0.0, color=colour, marker=marker, capsize=3)
        side, right = ("right", -6) if name in LEFT else ("left", 6)
        shift = right, -11 if name in BELOW else 4
        label = name.strip("`")
        axes.annotate(label, place, shift, textcoords="offset points", ha=side, fontsize=9)
    axes.axhline(0.25, label="chance", color="#57606a", linestyle=":")
    axes.set_xscale("log")
    axes.set(xlabel="bytes of a stream's state", ylabel="test accuracy", ylim=(0.15, 1.04))
    axes.set_title("Questions about 5 of 60 facts, after 300 steps of training")
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.4))
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "memories"))
