"""What a memory did over a run, from a record of its steps: the numbers behind the paper's Table 7 and Figures 5 to 10.

`record` runs inside the scan; the statistics are NumPy on the host, of one stream from one reset to the next.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rmjax.memoria._remind import Reminded
from rmjax.memoria._state import LONG_TERM, WORKING, State, edge_weights
from rmjax.types import Array


@flax.struct.dataclass
class Record:
    """Who was there and who was reminded; stacked over T steps every field is [T, C]."""

    serial: Array  # i32 [C], -1 where empty
    kind: Array  # i8 [C]
    age: Array  # i32 [C] steps
    reminded: Array  # bool [C]


def record(state: State, reminded: Reminded) -> Record:
    """The record of one step, of both that `remind` returned, not of the state after; `memoria.step` makes it itself.

    A step that was not active records nobody.
    """
    slots = jnp.concatenate([reminded.short_term.slots, reminded.long_term.slots])
    marked = jnp.zeros(state.kind.shape, bool).at[slots].set(True, mode="drop")
    active = (state.kind == WORKING).any()
    return Record(jnp.where(active, state.serial, -1), state.kind, state.age, marked)


def nobody(state: State) -> Record:
    """The record of a step before which this state had nobody."""
    return Record(
        jnp.full_like(state.serial, -1), state.kind, state.age, jnp.zeros(state.kind.shape, bool)
    )


def mean_age(history: Record) -> np.ndarray:
    """Mean age in steps of the reminded long-term engrams at each step, f64 [T]; NaN where there are none (Fig. 5)."""
    history = _one_stream(history)
    counted = history.reminded & (history.kind == LONG_TERM)
    number = counted.sum(-1)
    total = np.where(counted, history.age, 0).sum(-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def autocorrelation(history: Record, lags: int, kind: int = LONG_TERM) -> np.ndarray:
    """Autocorrelation of being reminded at lags 1 to `lags`, f64 [lags]; NaN where nobody stayed that long (Table 7).

    An engram's series is 1 where it was reminded and 0 where not, over the n recorded steps that it was of this kind
    (SHORT_TERM or LONG_TERM). Its coefficient at lag k < n is sum (x_t - m)(x_t+k - m) / sum (x_t - m)^2, m the mean of
    the whole series; 1 where the series is constant, as in the paper. The result is the mean over engrams: a plain one
    for short-term memory, weighted by n for long-term memory.
    """
    if lags < 1:
        raise ValueError(f"autocorrelation: lags={lags}, must be at least 1")
    history = _one_stream(history)
    times, slots = np.nonzero((history.kind == kind) & (history.serial >= 0))
    _, engram = np.unique(history.serial[times, slots], return_inverse=True)
    by_engram = np.argsort(engram, kind="stable")  # and by time, as they came
    engram, x = engram[by_engram], history.reminded[times, slots][by_engram].astype(float)
    length = np.bincount(engram)
    x -= (np.bincount(engram, x) / length)[engram]
    variation = np.bincount(engram, x * x)
    constant = variation < 1e-9  # of 0s and 1s it is at least (n - 1) / n where it is not 0
    weight = length if kind == LONG_TERM else np.ones_like(length)
    result = np.full(lags, np.nan)
    for lag in range(1, min(lags, length.max(initial=1) - 1) + 1):
        together = engram[lag:] == engram[:-lag]
        products = np.bincount(engram[lag:], np.where(together, x[lag:] * x[:-lag], 0.0))
        coefficient = np.where(constant, 1.0, products / np.where(constant, 1.0, variation))
        result[lag - 1] = np.average(coefficient[length > lag], weights=weight[length > lag])
    return result


def edges_above(state: State, weight: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges between different engrams with E_ij of at least `weight`: serials i, serials j, weights (Figs. 9, 10)."""
    if state.kind.ndim != 1:
        raise ValueError(
            f"edges_above: one stream's state, please; this one holds streams {state.kind.shape[:-1]}"
        )
    weights, serial = np.array(edge_weights(state)), np.asarray(state.serial)
    np.fill_diagonal(weights, 0.0)
    sources, targets = np.nonzero((weights >= weight) & (weights > 0))
    return serial[sources], serial[targets], weights[sources, targets]


def _one_stream(history: Record) -> Record:
    history = jax.tree.map(np.asarray, history)
    if history.serial.ndim != 2:
        raise ValueError(
            f"the history has fields of shape {history.serial.shape}, expected [T, C]: take one stream of it, "
            "as in jax.tree.map(lambda x: x[:, 0], history)"
        )
    if (history.reminded & (history.serial < 0)).any():
        raise ValueError(
            "the history was recorded of states after memorize_and_forget: record(*remind(...)) is meant"
        )
    return history
