"""Draws the paper's figures of a memory with matplotlib (`pip install -e '.[plots]'`).

Every function returns a matplotlib Figure, and also saves it if a path is given. A notebook shows
the figure after `%matplotlib inline`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from rmjax.memoria._history import edges_above
from rmjax.memoria._state import LONG_TERM, SHORT_TERM, WORKING, MemoriaConfig, State

KINDS = {
    WORKING: ("working", "tab:green"),
    SHORT_TERM: ("short-term", "tab:orange"),
    LONG_TERM: ("long-term", "tab:blue"),
}


def mean_age(ages: np.ndarray, path: str | Path | None = None) -> Figure:
    """Draws Figure 5: the mean age of the reminded long-term engrams at each step.

    Args:
      ages: [T], from `memoria.mean_age`.
      path: where to save the figure. None: nowhere.

    Returns:
      The figure.
    """
    figure, axes = _figure(1, 6, 3.5)
    axes[0].plot(np.arange(len(ages)), ages)
    axes[0].set(xlabel="step", ylabel="mean age of reminded\nlong-term engrams (steps)")
    return _finish(figure, path)


def autocorrelation(
    coefficients: np.ndarray, path: str | Path | None = None, label: str = "long-term memory"
) -> Figure:
    """Draws Figure 6: the autocorrelation of being reminded.

    Args:
      coefficients: [lags], from lag 1, from `memoria.autocorrelation`.
      path: where to save the figure. None: nowhere.
      label: names the memory.

    Returns:
      The figure.
    """
    figure, axes = _figure(1, 6, 3.5)
    axes[0].plot(np.arange(1, len(coefficients) + 1), coefficients, marker="o")
    axes[0].set(xlabel="lag (steps)", ylabel=f"autocorrelation, {label}")
    return _finish(figure, path)


def engrams(
    config: MemoriaConfig,
    states: Mapping[str, State],
    weight: float,
    path: str | Path | None = None,
) -> Figure:
    """Draws Figure 9: engrams and their strong edges, one panel for each state.

    Later engrams stand further right. The height of an engram is its place among those born at the
    same step, so it stays the same from panel to panel.

    Args:
      config: of the states.
      states: title of the panel -> state of one stream.
      weight: the least E_ij of an edge that is drawn.
      path: where to save the figure. None: nowhere.

    Returns:
      The figure.

    Raises:
      ValueError: there is no state, or a state is of several streams.
    """

    def places(serials: np.ndarray) -> np.ndarray:
        return np.stack(_births(config, serials), -1)

    figure, axes = _graphs(states, weight, places)
    last = max(int(state.next_serial) for state in states.values()) // config.working
    for axis in axes:
        axis.set(xlabel="step of birth", xlim=(-1, last + 1), ylim=(-0.1, 1.1), yticks=[])
    return _finish(figure, path)


def seen_twice(
    config: MemoriaConfig,
    states: Mapping[str, State],
    weight: float,
    period: int,
    path: str | Path | None = None,
) -> Figure:
    """Draws Figure 10: engrams of a memory that sees the same data twice.

    Engrams of the first time are below, those of the second time above. Engrams in one column come
    from the same data. If the data come more than twice, later times stand higher.

    Args:
      config: of the states.
      states: title of the panel -> state of one stream.
      weight: the least E_ij of an edge that is drawn.
      period: steps that the data take once.
      path: where to save the figure. None: nowhere.

    Returns:
      The figure.

    Raises:
      ValueError: `period` is below 1, there is no state, or a state is of several streams.
    """
    if period < 1:
        raise ValueError(f"seen_twice: {period=}, must be at least 1: the steps that the data take")

    def places(serials: np.ndarray) -> np.ndarray:
        born, place = _births(config, serials)
        return np.stack([born % period, born // period + 0.8 * place], -1)

    figure, axes = _graphs(states, weight, places)
    last = max(int(state.next_serial) for state in states.values()) // config.working
    times = max(1, -(-last // period))
    for axis in axes:
        axis.set(xlabel="step in the data", xlim=(-1, period), ylim=(-0.1, times))
        axis.set_yticks(np.arange(times) + 0.4, [f"time {n + 1}" for n in range(times)])
    return _finish(figure, path)


def _births(config: MemoriaConfig, serials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the step of birth, and the place 0 to 1 among engrams born at the same step."""
    return serials // config.working, (serials % config.working) / max(1, config.working - 1)


def _graphs(
    states: Mapping[str, State], weight: float, places: Callable[[np.ndarray], np.ndarray]
) -> tuple[Figure, np.ndarray]:
    """Draws a panel for each state; `places` maps serials [n] to points [n, 2]."""
    if not states:
        raise ValueError("nothing to draw: no state was given")
    figure, axes = _figure(len(states), 4.5, 3.5)
    for axis, (title, state) in zip(axes, states.items(), strict=True):
        sources, targets, weights = edges_above(state, weight)
        lines = list(np.stack([places(sources), places(targets)], 1))
        widths = 0.6 * weights
        edges = LineCollection(lines, colors="0.4", alpha=0.25, linewidths=widths, zorder=1)
        axis.add_collection(edges)
        serial, kind = np.asarray(state.serial), np.asarray(state.kind)
        for number, (name, colour) in KINDS.items():
            if not (kind == number).any():
                continue
            axis.scatter(*places(serial[kind == number]).T, s=8, color=colour, label=name, zorder=2)
        axis.set_title(title)
    handles = {
        label: dot
        for axis in axes
        for dot, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    return figure, axes


def _figure(panels: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Returns a figure and its panels [panels], side by side."""
    figure = Figure((panels * width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels))


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    """Saves the figure if a path is given."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
