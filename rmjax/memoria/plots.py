"""The paper's figures of a memory at work, drawn with matplotlib (`pip install -e '.[plots]'`).

Each returns a matplotlib Figure, which a notebook shows (after `%matplotlib inline`), and saves it as `path` if given.
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
    """Figure 5: mean age of reminded long-term engrams [T] (`history.mean_age`) at each step."""
    figure, axes = _figure(1, 6, 3.5)
    axes[0].plot(np.arange(len(ages)), ages)
    axes[0].set(xlabel="step", ylabel="mean age of reminded\nlong-term engrams (steps)")
    return _finish(figure, path)


def autocorrelation(
    coefficients: np.ndarray, path: str | Path | None = None, label: str = "long-term memory"
) -> Figure:
    """Figure 6: autocorrelation [lags] of being reminded (`history.autocorrelation`), lags from 1."""
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
    """Figure 9: engrams, the later born the further right, and their edges of at least `weight`; one panel a state.

    An engram's height is its place among those born with it, so that it stays where it is from panel to panel.
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
    """Figure 10: the same `period` steps of data seen twice: engrams of the first time below, of the second above.

    What stands in one column was made of the same data. Where the data come more often, later times go further up.
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
    """Step of birth, and the place among those born with it, from 0 to 1."""
    return serials // config.working, (serials % config.working) / max(1, config.working - 1)


def _graphs(
    states: Mapping[str, State], weight: float, places: Callable
) -> tuple[Figure, np.ndarray]:
    """One panel a state: engrams where `places` (serials [n] -> [n, 2]) puts them, and the edges above the weight."""
    if not states:
        raise ValueError("nothing to draw: no state was given")
    figure, axes = _figure(len(states), 4.5, 3.5)
    for axis, (title, state) in zip(axes, states.items(), strict=True):
        sources, targets, weights = edges_above(state, weight)
        lines = np.stack([places(sources), places(targets)], 1)
        axis.add_collection(
            LineCollection(
                list(lines), colors="0.4", alpha=0.25, linewidths=0.6 * weights, zorder=1
            )
        )
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
    figure = Figure((panels * width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels))


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
