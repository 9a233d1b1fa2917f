"""The figure of a table whose columns are the points of a curve, such as '4 pairs', '8 pairs'."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from rmjax.io import atomic

Lines = Sequence[Sequence[dict[str, Any]]]  # the final table of each seed, the machine first


class Curve(NamedTuple):
    """One row of the table, or one reference of its data.

    Attributes:
      name: of the row.
      state: bytes of the memory of one stream, as in results.json; None for a reference.
      seeds: runs behind each point; 0 for a reference.
      x: the numbers in the names of the columns, rising.
      mean: over the seeds, one a point.
      std: sample standard deviation over the seeds; 0 with fewer than two of them.
    """

    name: str
    state: int | None
    seeds: int
    x: list[int]
    mean: list[float]
    std: list[float]


def curves(rows: Mapping[str, Lines], unit: str) -> list[Curve]:
    """Collects the points of all rows, and of the references of the first row.

    Args:
      rows: {row: final tables of its seeds}.
      unit: the columns that are points end with it: '4 pairs' for ' pairs'.

    Returns:
      The curves; none if the tables have no such columns.
    """
    first = next(iter(rows.values()), [])
    readers: dict[str, list[dict[str, Any]]] = {
        name: [table[0] for table in tables] for name, tables in rows.items()
    }
    for line in (line for table in first[:1] for line in table[1:]):
        readers.setdefault(line["memory"], [line])
    made = []
    for name, lines in readers.items():
        columns = {int(key.removesuffix(unit)): key for key in lines[0] if _is_point(key, unit)}
        x = sorted(columns)
        values = np.array([[line[columns[n]] for n in x] for line in lines])
        std = values.std(0, ddof=1) if len(lines) > 1 else np.zeros(len(x))
        seeds = len(lines) if name in rows else 0
        state = lines[0].get("state_bytes")
        curve = Curve(name, state, seeds, x, values.mean(0).tolist(), std.tolist())
        made += [curve] if x else []
    return made


def _is_point(column: str, unit: str) -> bool:
    return re.fullmatch(rf"\d+{re.escape(unit)}", column) is not None


def markdown(made: Sequence[Curve], unit: str) -> str:
    """Formats curves as a Markdown table, with a column for each point."""
    points = sorted({x for curve in made for x in curve.x})
    head = ["memory", "bytes of state", "seeds", *(f"{x}{unit}" for x in points)]
    lines = [head, ["---"] * len(head)]
    for c in made:
        known = {
            x: f"{mean:.3f} ± {std:.3f}" if c.seeds > 1 else f"{mean:.3f}"
            for x, mean, std in zip(c.x, c.mean, c.std, strict=True)
        }
        state = "-" if c.state is None else str(c.state)
        lines.append([c.name, state, str(c.seeds), *(known.get(x, "-") for x in points)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def keep(made: Sequence[Curve], unit: str, workdir: Path, title: str, measure: str) -> None:
    """Writes curve.json, curve.md and curve.png; without matplotlib, logs that the last is missing.

    Args:
      made: the curves.
      unit: as in `curves`.
      workdir: folder of the files.
      title: of the figure.
      measure: name of the values, such as 'accuracy'.
    """
    atomic.write(workdir / "curve.json", json.dumps([c._asdict() for c in made], indent=1))
    atomic.write(workdir / "curve.md", markdown(made, unit))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        missing = "matplotlib is not installed (pip install 'rmjax[plots]')"
        logging.info("no %s: %s", workdir / "curve.png", missing)
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for c in made:
        if not c.seeds:
            axes.plot(c.x, c.mean, ":", label=c.name)
        else:
            size = "" if c.state is None else f" ({c.state:,} bytes of state)"
            label = f"{c.name}{size}"
            axes.errorbar(c.x, c.mean, c.std, marker="o", capsize=3, label=label)
    points = sorted({x for c in made for x in c.x})
    axes.set_xscale("log", base=2)
    axes.set_xticks(points, map(str, points))
    axes.set(xlabel=f"number of{unit}", ylabel=f"test {measure}", title=title)
    axes.set_ylim(0, 1.02 if max(max(c.mean) for c in made) <= 1 else None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(workdir / "curve.png", dpi=120)
