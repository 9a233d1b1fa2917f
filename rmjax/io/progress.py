"""Progress of preparations that take minutes.

They log a line every ten seconds, and end early if the run is asked to stop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from absl import logging

from rmjax.io import terminal

EVERY = 10.0  # seconds between two lines
T = TypeVar("T")


class Stopped(Exception):
    """The run was asked to stop."""


class Request:
    """Whether this process was asked to stop.

    A signal handler sets it, so it is a plain attribute: a lock could block in a handler.
    """

    made = False


REQUEST = Request()


def look(doing: str) -> None:
    """Checks whether the run was asked to stop.

    Args:
      doing: what the run does, for the error, such as 'preparing documents'.

    Raises:
      Stopped: the run was asked to stop.
    """
    if REQUEST.made:
        raise Stopped(f"asked to stop while {doing}; run the same line again to begin this anew")


class Progress:
    """Counts the steps of a preparation and logs them. Call `step` several times a second.

    Args:
      doing: what is done, for the log, such as 'preparing documents'.
      total: all steps, as `step` counts them; 0: unknown.
      unit: the unit of the log.
      size: how many counts of `step` make one unit.
    """

    def __init__(self, doing: str, total: int = 0, unit: str = "MB", size: float = 1e6):
        self._doing, self._total, self._unit, self._size = doing, total, unit, size
        self._done, self._begin = 0, time.monotonic()
        self._last = self._begin
        self._bar = terminal.bar(doing, max(1, round(total / size)) if total else 0, unit=unit)

    def step(self, count: int = 1) -> None:
        """Adds to the count.

        Args:
          count: steps since the last call.

        Raises:
          Stopped: the run was asked to stop.
        """
        self.to(self._done + count)

    def to(self, done: int) -> None:
        """Sets the count.

        Args:
          done: all steps so far.

        Raises:
          Stopped: the run was asked to stop.
        """
        self._done = done
        look(self._doing)
        self._bar.update(round(done / self._size) - self._bar.n)
        moment = time.monotonic()
        if moment >= self._last + EVERY and self._bar.disable:
            self._last = moment
            rate = self._done / self._size / (moment - self._begin)
            digits = 0 if self._size == 1 else 1
            amount = f"{min(done, self._total or done) / self._size:,.{digits}f}"
            total = f" of {self._total / self._size:,.{digits}f}" if self._total else ""
            unit = self._unit
            logging.info("%s: %s%s %s, %.1f %s/s", self._doing, amount, total, unit, rate, unit)

    def close(self) -> None:
        """Removes the live line from a terminal."""
        self._bar.close()


def watch(entries: Iterable[T], doing: str, unit: str) -> Iterator[T]:
    """Passes entries on, and counts each as a step of a `Progress`.

    Args:
      entries: any number of them; the total is unknown.
      doing: as `Progress` takes it.
      unit: the name of the entries.

    Yields:
      The entries.

    Raises:
      Stopped: the run was asked to stop.
    """
    progress = Progress(doing, unit=unit, size=1)
    try:
        for entry in entries:
            progress.step()
            yield entry
    finally:
        progress.close()
