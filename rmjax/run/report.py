"""report.html and learning_curve.png in the workdir: the config, curves and tables of a run.

The page needs no other file and no network; its figures are SVG.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from rmjax import config as configs
from rmjax.io import atomic
from rmjax.run import kept
from rmjax.run.reporting import read_metrics, short

Series = dict[str, list[tuple[int, float]]]  # name -> (step, value)
Rows = Sequence[Mapping[str, Any]]
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 234, 56, 30  # of a figure and its margins, in pixels
_COLORS = ["#4269d0", "#d9822b", "#3ca951", "#c0392b", "#8e63ce", "#17a2b8", "#97bbf5", "#9c6b4e"]
_STYLE = """
:root { color-scheme: light dark; --faint: #8885; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(27rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } figure span { margin-right: .8rem; }
svg { width: 100%; font: 11px system-ui, sans-serif; fill: currentColor; }
svg path { fill: none; stroke-width: 1.6; } svg .grid { stroke: var(--faint); stroke-width: 1; }
"""


class Figure(NamedTuple):
    """One figure: curves over the steps of a stage."""

    title: str
    series: Series


def write(workdir: Path, tables: Mapping[str, Rows]) -> None:
    """Writes report.html, and learning_curve.png if matplotlib is installed.

    Args:
      workdir: of a run; the curves are those of its metrics.jsonl, if there is one.
      tables: {title: rows}, values by name.

    Raises:
      OSError: the workdir cannot be written to.
    """
    config, _ = kept.read_config(workdir)
    figures = read_figures(workdir / "metrics.jsonl")
    atomic.write(workdir / "report.html", page(workdir.name, config, tables, figures))
    save_curves(workdir / "learning_curve.png", figures)


def read_figures(path: Path) -> list[Figure]:
    """Collects the curves of a run.

    Args:
      path: of its metrics.jsonl, which may be missing.

    Returns:
      A figure for the losses of each stage, and one for each other measure at all of its cuts;
      those of training come last. Values that are not finite are left out.
    """
    figures: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    for stage, kind, step, entry in read_metrics(path):
        for name, value in entry.items():
            if isinstance(value, str) or not math.isfinite(value):
                continue
            if name in ("streams_per_second", "queries_per_second"):
                continue  # most often multiples of the steps per second
            name = name.replace("_", " ")
            alone = (
                kind != "train"
                or name in ("grad norm", "rehearsal ratio")
                or name.endswith("per second")
            )
            shared = name.split("@")[0]  # hr@1, hr@5 and so on are in one figure
            title = f"{stage}: {kind}, {shared}" if alone else f"{stage}: losses"
            figures[title][name].append((step, value))
    order = ("losses", "valid")
    place = lambda title: [word not in title.split(": ")[1] for word in order]
    return [Figure(title, dict(figures[title])) for title in sorted(figures, key=place)]


def page(name: str, config: ConfigDict, tables: Mapping[str, Rows], figures: list[Figure]) -> str:
    """Returns the report as HTML.

    Args:
      name: of the run, for the title.
      config: of the run.
      tables: {title: rows}.
      figures: the curves.
    """
    read = {key: value for key, value in configs.flatten(config) if configs.reads(config, key)}
    defaults = dict(configs.flatten(configs.base()))
    changed = {key: value for key, value in read.items() if value != defaults.get(key)}
    parts = [f"<h2>{html.escape(title)}</h2>\n{table(rows)}" for title, rows in tables.items()]
    if figures:
        drawn = "\n".join(map(figure, figures))
        parts.append(f'<h2>Curves by step</h2>\n<div class="figures">\n{drawn}\n</div>')
    key_table = lambda keys: table([{"key": k, "value": str(v)} for k, v in keys.items()])
    parts.append(f"<h2>Config: values that differ from the defaults</h2>\n{key_table(changed)}")
    parts.append(
        f"<details><summary>All values that this run reads</summary>\n{key_table(read)}</details>"
    )
    title, body = html.escape(name), "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def table(rows: Rows) -> str:
    """Returns rows as an HTML table; every name is a column, in order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cell = lambda tag, value: f"<{tag}>{html.escape(value)}</{tag}>"
    head = "".join(cell("th", name.replace("_", " ")) for name in names)
    lines = ("".join(cell("td", short(row.get(name))) for name in names) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    span = high - low
    step = 10 ** math.floor(math.log10(span / count))
    step *= min((1, 2, 5, 10), key=lambda factor: abs(span / (factor * step) - count))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def figure(drawn: Figure) -> str:
    """Returns a figure as HTML with an SVG: lines, axes with ticks, and a legend."""
    points = [point for line in drawn.series.values() for point in line]
    (x0, x1), (y0, y1) = (_span(axis) for axis in zip(*points, strict=True))
    width, height = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - 8
    x_of = lambda x: _LEFT + (x - x0) / (x1 - x0) * width
    y_of = lambda y: 8 + (y1 - y) / (y1 - y0) * height
    parts, legend = [], []
    for y in ticks(y0, y1):
        line = f'<path class="grid" d="M{_LEFT},{y_of(y):.1f}h{width}"/>'
        parts.append(
            f'{line}<text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in ticks(x0, x1):
        parts.append(
            f'<text x="{x_of(x):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{x:g}</text>'
        )
    for i, (name, curve) in enumerate(drawn.series.items()):
        color, (last, end) = _COLORS[i % len(_COLORS)], curve[-1]
        path = "L".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in curve)
        # A dot shows a curve of one step.
        dot = f'<circle cx="{x_of(last):.1f}" cy="{y_of(end):.1f}" r="2.5" fill="{color}"/>'
        label = html.escape(f"{name} {short(end)}")
        legend.append(f'<span style="color:{color}">{label}</span>')
        parts.append(f'<path d="M{path}" stroke="{color}"/>{dot}')
    title, svg, box = html.escape(drawn.title), "\n".join(parts), f"0 0 {_WIDTH} {_HEIGHT}"
    return (
        f"<figure><figcaption>{title}</figcaption>\n<small>{' '.join(legend)}</small>\n"
        f'<svg viewBox="{box}" role="img" aria-label="{title}">\n{svg}\n</svg></figure>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest value, at least a little apart."""
    low, high = min(values), max(values)
    margin = 0.0 if high > low else max(abs(low), 1.0) / 10
    return low - margin, high + margin


def save_curves(path: Path, figures: list[Figure]) -> None:
    """Saves the curves as a PNG; without matplotlib, logs that the file is missing.

    Args:
      path: of the file.
      figures: the curves; without any, nothing is saved.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        logging.info("no %s: matplotlib is not installed (pip install 'rmjax[plots]')", path.name)
        return
    if not figures:
        return
    rows = -(-len(figures) // 3)
    canvas = Canvas(figsize=(12, 2.8 * rows), layout="constrained")
    for place, drawn in enumerate(figures, 1):
        axes = canvas.add_subplot(rows, 3, place, title=drawn.title, xlabel="step")
        for name, line in drawn.series.items():
            axes.plot(*zip(*line, strict=True), marker=".", markersize=3, label=name)
        if len(drawn.series) > 1:
            axes.legend()
    canvas.savefig(path, dpi=100)
