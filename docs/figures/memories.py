"""Draws docs/images/memories.svg: accuracy on the evidence world against the bytes of a state.

    python docs/figures/memories.py

The numbers are those of docs/results/records/memories_evidence.json.
"""

from __future__ import annotations

from common import RECORDS, save, use_style
from matplotlib.figure import Figure

from rmjax.tools import ledger

GROWS = ("`buffer`", "`directly_reason`", "`multihop_reason`")  # these keep all items
REHEARSE = ("RM", "CM")
LEFT = (
    "RM",
    "CM",
    "`dnc`",
    "`gated_delta`",
    "`hpmn`",
    "`rmt`",
)  # points with the label at the left
BELOW = ("CM", "`compressive`", "`nutm`")  # points with the label below


def draw() -> Figure:
    """Draws a point for each memory: the mean, and a bar of one standard deviation over seeds."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for row in ledger.read(RECORDS / "memories_evidence.json")["tables"][0]["rows"]:
        name, size, accuracy = str(row["memory"]), row["bytes of state"], row["accuracy"]
        assert not isinstance(size, str) and not isinstance(accuracy, str)
        if "reason only" in name:
            continue  # three points of one machine would cover each other
        place = ledger.mean(size), ledger.mean(accuracy)
        colour = "#0550ae" if name in REHEARSE else "#57606a" if name in GROWS else "#d9730d"
        marker = {"#0550ae": "o", "#57606a": "D", "#d9730d": "s"}[colour]
        axes.errorbar(*place, ledger.std(accuracy) or 0.0, color=colour, marker=marker, capsize=3)
        side, right = ("right", -6) if name in LEFT else ("left", 6)
        shift = right, -11 if name in BELOW else 4
        label = name.strip("`")
        axes.annotate(label, place, shift, textcoords="offset points", ha=side, fontsize=9)
    for label, colour, marker in (
        ("with rehearsal", "#0550ae", "o"),
        ("fixed size, without", "#d9730d", "s"),
        ("keeps all items", "#57606a", "D"),
    ):
        axes.plot([], [], label=label, color=colour, marker=marker, linestyle="")
    axes.axhline(0.25, label="chance", color="#57606a", linestyle=":")
    axes.set_xscale("log")
    axes.set(xlabel="bytes of a stream's state", ylabel="test accuracy", ylim=(0.15, 1.04))
    axes.set_title("Questions about 5 of 60 facts, after 300 steps of training")
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.4))
    return figure


if __name__ == "__main__":
    use_style()
    print(save(draw(), "memories"))
