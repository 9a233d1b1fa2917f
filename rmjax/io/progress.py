"""Preparations that take minutes: a log line every ten seconds, and a way out when asked to stop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from absl import logging

EVERY = 10.0  # seconds between two lines
T = TypeVar("T")


class Stopped(Exception):
    """The run was asked to stop."""


class Request:
    """Whether somebody asked this process to stop. A signal handler sets it: it takes no lock."""

    made = False


REQUEST = Request()


def look(doing: str) -> None:
    """Raises Stopped if the run was asked to stop while it was `doing` something."""
    if REQUEST.made:
        raise Stopped(f"asked to stop while {doing}; run the same line again to begin this anew")


class Progress:
    """How far a preparation is. Call `step` several times a second."""

    def __init__(self, doing: str, total: int = 0, unit: str = "MB", size: float = 1e6):
        """Args:
        doing: what is done, for the log, such as 'preparing documents'.
        total: how much there is to do, counted as `step` counts; 0 where this is not known.
        unit: what the log counts in.
        size: how many of `step`'s counts are one unit.
        """
        self._doing, self._total, self._unit, self._size = doing, total, unit, size
        self._done, self._begin = 0, time.monotonic()
        self._last = self._begin

    def step(self, count: int = 1) -> None:
        """Counts what is done since the last call.

        Raises:
          Stopped: the run was asked to stop.
        """
        self.to(self._done + count)

    def to(self, done: int) -> None:
        """As `step`, for callers who know how much is done in all."""
        self._done = done
        look(self._doing)
        moment = time.monotonic()
        if moment >= self._last + EVERY:
            self._last = moment
            rate = self._done / self._size / (moment - self._begin)
            some = f"{min(done, self._total or done) / self._size:,.1f}"
            of = f" of {self._total / self._size:,.1f}" if self._total else ""
            logging.info(
                "%s: %s%s %s, %.1f %s/s", self._doing, some, of, self._unit, rate, self._unit
            )


def watch(entries: Iterable[T], doing: str, unit: str) -> Iterator[T]:
    """`entries`, each of them a step of a `Progress`."""
    progress = Progress(doing, unit=unit, size=1)
    for entry in entries:
        progress.step()
        yield entry
