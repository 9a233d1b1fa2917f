"""Memoria: a Hebbian memory of engrams in three levels, as pure functions of an explicit state (Memoria section 3).

`init` makes the state of one stream; a step is `remind`, exploit, `memorize_and_forget`, or all three in `step`.
`rmjax.memoria.plots` draws what happened.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rmjax.memoria._exploit import contribution, exploit
from rmjax.memoria._history import Record, autocorrelation, edges_above, mean_age, nobody, record
from rmjax.memoria._memorize import memorize_and_forget
from rmjax.memoria._remind import Engrams, Reminded, remind
from rmjax.memoria._state import (
    EMPTY,
    LONG_TERM,
    SHORT_TERM,
    WORKING,
    MemoriaConfig,
    State,
    cofire_counts,
    edge_weights,
    fork,
    init,
    reset,
)
from rmjax.memoria._step import step

if TYPE_CHECKING:
    from rmjax.memoria.saving import load, save

__all__ = [
    "EMPTY",
    "LONG_TERM",
    "SHORT_TERM",
    "WORKING",
    "Engrams",
    "MemoriaConfig",
    "Record",
    "Reminded",
    "State",
    "autocorrelation",
    "cofire_counts",
    "contribution",
    "edge_weights",
    "edges_above",
    "exploit",
    "fork",
    "init",
    "load",
    "mean_age",
    "memorize_and_forget",
    "nobody",
    "record",
    "remind",
    "reset",
    "save",
    "step",
]


def __getattr__(name: str) -> Any:
    if name in ("load", "save"):  # on use: Orbax, which they need, takes long to import
        return getattr(importlib.import_module("rmjax.memoria.saving"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
