"""Statistics of a memory over a run: the numbers of the paper's Table 7 and Figures 5, 6, 9 and 10.

`record` runs inside the scan. The statistics are NumPy code on the host; they take the history of
one stream, from one reset to the next.
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
    """Which engrams a step had, and which it reminded. A history of T steps has fields [T, C]."""

    serial: Array  # i32 [C], -1 where the slot is empty
    kind: Array  # i8 [C]
    age: Array  # i32 [C] steps
    reminded: Array  # bool [C]


def record(state: State, reminded: Reminded) -> Record:
    """Returns the record of one step; `memoria.step` calls it.

    Args:
      state: as `remind` returned it, not the state after `memorize_and_forget`.
      reminded: as `remind` returned it.

    Returns:
      The record; without any engram where the step was not active.
    """
    slots = jnp.concatenate([reminded.short_term.slots, reminded.long_term.slots])
    marked = jnp.zeros(state.kind.shape, bool).at[slots].set(True, mode="drop")
    active = (state.kind == WORKING).any()
    return Record(jnp.where(active, state.serial, -1), state.kind, state.age, marked)


def empty_record(state: State) -> Record:
    """Returns a record without any engram, in the shapes of this state.

    Args:
      state: of one stream or of several.

    Returns:
      The record.
    """
    none = jnp.full_like(state.serial, -1)
    return Record(none, state.kind, state.age, jnp.zeros(state.kind.shape, bool))


def mean_age(history: Record) -> np.ndarray:
    """Returns the mean age of the reminded long-term engrams at each step (Figure 5).

    Args:
      history: of one stream, fields [T, C].

    Returns:
      f64 [T], in steps; NaN where no long-term engram is reminded.

    Raises:
      ValueError: the history is of several streams, or of states after `memorize_and_forget`.
    """
    history = _one_stream(history)
    counted = history.reminded & (history.kind == LONG_TERM)
    number = counted.sum(-1)
    total = np.where(counted, history.age, 0).sum(-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def autocorrelation(history: Record, lags: int, kind: int = LONG_TERM) -> np.ndarray:
    """Returns the autocorrelation of being reminded (Appendix D, Table 7, Figure 6).

    The series x of an engram covers the n recorded steps in which it was of this kind. It is 1
    where the engram was reminded, and 0 elsewhere. Let m be the mean of the entire series. The
    coefficient at lag k < n is sum (x_t - m)(x_t+k - m) / sum (x_t - m)^2. The coefficient of a
    constant series is 1, as in the paper. The result is the mean over engrams: unweighted for
    short-term memory, weighted by n for long-term memory.

    Args:
      history: of one stream, fields [T, C].
      lags: the largest lag, in steps.
      kind: SHORT_TERM or LONG_TERM.

    Returns:
      f64 [lags], for lags 1 to `lags`; NaN where no engram stayed that long.

    Raises:
      ValueError: `lags` is below 1; or the history is of several streams, or of states after
        `memorize_and_forget`.
    """
    if lags < 1:
        raise ValueError(f"autocorrelation: lags={lags}, must be at least 1")
    history = _one_stream(history)
    times, slots = np.nonzero((history.kind == kind) & (history.serial >= 0))
    _, engram = np.unique(history.serial[times, slots], return_inverse=True)
    by_engram = np.argsort(engram, kind="stable")  # the steps of an engram stay in order
    engram, x = engram[by_engram], history.reminded[times, slots][by_engram].astype(float)
    length = np.bincount(engram)
    x -= (np.bincount(engram, x) / length)[engram]
    variation = np.bincount(engram, x * x)
    constant = (
        variation < 1e-9
    )  # a series of 0s and 1s that is not constant has (n - 1) / n or more
    weight = length if kind == LONG_TERM else np.ones_like(length)
    result = np.full(lags, np.nan)
    for lag in range(1, min(lags, length.max(initial=1) - 1) + 1):
        together = engram[lag:] == engram[:-lag]
        products = np.bincount(engram[lag:], np.where(together, x[lag:] * x[:-lag], 0.0))
        coefficient = np.where(constant, 1.0, products / np.where(constant, 1.0, variation))
        result[lag - 1] = np.average(coefficient[length > lag], weights=weight[length > lag])
    return result


def edges_above(state: State, weight: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the strong edges between different engrams (Figures 9 and 10).

    Args:
      state: of one stream.
      weight: the least E_ij; an edge of weight 0 is never returned.

    Returns:
      Serials i, serials j and weights E_ij, each [edges].

    Raises:
      ValueError: the state is of several streams.
    """
    if state.kind.ndim != 1:
        raise ValueError(
            "edges_above needs one stream's state, "
            f"but this state has streams {state.kind.shape[:-1]}: take one of them"
        )
    weights, serial = np.array(edge_weights(state)), np.asarray(state.serial)
    np.fill_diagonal(weights, 0.0)
    sources, targets = np.nonzero((weights >= weight) & (weights > 0))
    return serial[sources], serial[targets], weights[sources, targets]


def _one_stream(history: Record) -> Record:
    """Returns the history in NumPy arrays; raises ValueError where it is not one of one stream."""
    history = jax.tree.map(np.asarray, history)
    if history.serial.ndim != 2:
        raise ValueError(
            f"the history has fields of shape {history.serial.shape}, expected [T, C]: take one "
            "stream of it, as in jax.tree.map(lambda x: x[:, 0], history)"
        )
    if (history.reminded & (history.serial < 0)).any():
        raise ValueError(
            "the history records states after memorize_and_forget: call record(*remind(...))"
        )
    return history
