"""What the scripts of the figures share: style, colours, data and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmjax.tools import ledger

HERE = Path(__file__).resolve().parent
DATA, IMAGES, RECORDS = HERE / "data", HERE.parent / "images", HERE.parent / "results" / "records"
# One look for each memory, in every figure: colour, marker, line.
LOOKS = {
    "RM": ("#0550ae", "o", "-"),
    "RM with rehearsal": ("#0550ae", "o", "-"),
    "CM": ("#54aeff", "D", "-"),
    "Gated delta rule": ("#d9730d", "s", "-"),
    "Gated delta rule, small": ("#d9730d", "P", "--"),
    "DNC": ("#8250df", "^", "-"),
    "NUTM": ("#8250df", "<", "--"),
    "DMSDNC": ("#8250df", ">", ":"),
    "Titans": ("#9a6700", "h", "-"),
    "CT": ("#bf3989", "p", "-"),
    "HPMN": ("#1b7c83", "d", "-"),
    "GRU": ("#cf222e", "v", "-"),
    "Last 8 items": ("#2da44e", "X", "-"),
    "All items": ("#57606a", "*", "-"),
    "others": ("#8c959f", "", "-"),
    "guess": ("#57606a", "", ":"),
}


def look(name: str) -> dict[str, str]:
    """The colour, marker and line of a memory, as arguments of `Axes.plot`."""
    colour, marker, line = LOOKS[name]
    return {"color": colour, "marker": marker, "linestyle": line}


def use_style() -> None:
    """Sets the style of the figures, on top of the defaults of matplotlib."""
    mpl.rcdefaults()
    mpl.style.use(HERE / "rmjax.mplstyle")


def read(name: str) -> Any:
    """Reads docs/figures/data/<name>.json."""
    return json.loads((DATA / f"{name}.json").read_text())


def table(record: str, part: str, names: str) -> dict[str, list[dict[str, float]]]:
    """Reads a table of docs/results/records/<record>.json.

    Args:
      record: its name.
      part: the name of the table.
      names: the column of the rows' names.

    Returns:
      {name of the rows: the numbers of each row of that name, by column}.

    Raises:
      ValueError: the record has no such table.
    """
    tables = json.loads((RECORDS / f"{record}.json").read_text())["tables"]
    chosen = [one for one in tables if one["name"] == part]
    if not chosen:
        known = ", ".join(repr(one["name"]) for one in tables)
        raise ValueError(f"{RECORDS / record}.json has no table {part!r}: it has {known}")
    rows: dict[str, list[dict[str, float]]] = {}
    for row in chosen[0]["rows"]:
        numbers = {key: number(row[key]) for key in row if key != names}
        known_numbers = {key: value for key, value in numbers.items() if value is not None}
        rows.setdefault(row[names].strip("`"), []).append(known_numbers)
    return rows


def number(cell: Any) -> float | None:
    """The mean of a cell of a record, or the number that its text is; None without a number."""
    if isinstance(cell, dict):
        return ledger.mean(cell)
    try:
        return float(str(cell).replace(",", ""))
    except ValueError:
        return None


def write(name: str, content: Any) -> None:
    """Writes docs/figures/data/<name>.json, one entry a line."""
    DATA.mkdir(exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(content[key])}" for key in content)
    (DATA / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")


def beside(axes: Axes, **options: Any) -> None:
    """Puts the legend to the right of the panel."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), **options)


def save(figure: Figure, name: str, kind: str = "svg") -> Path:
    """Saves a figure in docs/images, without the date, and returns its path."""
    path = IMAGES / f"{name}.{kind}"
    nothing = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    figure.savefig(path, metadata=nothing[kind])
    return path
