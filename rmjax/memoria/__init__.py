"""Memoria: a Hebbian memory of engrams in three levels, as pure functions of an explicit state (Memoria section 3)."""

from rmjax.memoria.memorize import memorize_and_forget
from rmjax.memoria.remind import Engrams, Reminded, remind
from rmjax.memoria.state import MemoriaConfig, State, cofire_counts, edge_weights, fork, init, reset

__all__ = [
    "Engrams",
    "MemoriaConfig",
    "Reminded",
    "State",
    "cofire_counts",
    "edge_weights",
    "fork",
    "init",
    "memorize_and_forget",
    "remind",
    "reset",
]
