"""Memoria: a Hebbian memory of engrams in three levels (Memoria section 3).

It is a set of pure functions of an explicit state. `init` makes the state of one stream. A step is
`remind`, then `exploit`, then `memorize_and_forget`; `step` is all three. `rmjax.memoria.plots`
draws the figures of the paper.
"""

import importlib
from typing import TYPE_CHECKING

from rmjax.memoria._exploit import contribution, exploit
from rmjax.memoria._history import (
    Record,
    autocorrelation,
    edges_above,
    empty_record,
    mean_age,
    record,
)
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
    "empty_record",
    "exploit",
    "fork",
    "init",
    "load",
    "mean_age",
    "memorize_and_forget",
    "record",
    "remind",
    "reset",
    "save",
    "step",
]


def __getattr__(name: str) -> object:
    if name in ("load", "save"):  # imported on use: they need Orbax, which takes long to import
        return getattr(importlib.import_module("rmjax.memoria.saving"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
