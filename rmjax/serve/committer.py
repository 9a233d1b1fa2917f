"""One thread that writes changed rows to the database, all that came since the last commit at once.

`sync` says when a write returns. All three keep the database intact after a power failure.

    each     as soon as its rows are on the disk; commits follow each other at once
    group    after the commit of its group; commits are 20 ms apart
    none     once it is applied in memory; a kill loses the running commit and the next group
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from absl import logging

from rmjax.serve.database import Database, Row, User
from rmjax.serve.worker import CLOSED

SYNCS = ("each", "group", "none")
GROUP = 0.02  # seconds between two commits

Rows = Mapping[User, Row | None]


@dataclasses.dataclass(frozen=True)
class Change:
    """Rows that are committed together.

    Attributes:
      rows: makes {user: the new row, or None to remove it}; called by the committer's thread.
      done: is called with None after the commit, or with the error.
      clear: removes all users that were committed before.
    """

    rows: Callable[[], Rows]
    done: Callable[[OSError | None], None]
    clear: bool = False


class Committer:
    """Commits changes in the order in which they came.

    After a failed commit nothing is committed until `take_failed`: rows that came later were
    computed from rows that are not on the disk.

    Args:
      database: where to.
      wait: least seconds between two commits, in which changes gather.
      failed: is called, in this thread, after a commit failed; makes the worker roll back, and
        returns False if there is no worker any more.

    Attributes:
      thread: the thread that commits.
    """

    def __init__(self, database: Database, wait: float, failed: Callable[[], bool]):
        self._database, self._wait, self._report = database, wait, failed
        self._changes: list[Change] = []
        self._changed = threading.Condition()
        self._error: OSError | None = None
        self._due = 0.0  # no commit before this time, unless somebody waits for it
        self._busy = self._urgent = self._closing = self._ended = False
        self.thread = threading.Thread(target=self._run, name="streams-committer", daemon=True)
        self.thread.start()

    def add(self, change: Change) -> None:
        """Hands over a change, and returns at once. Raises RuntimeError after the end."""
        with self._changed:
            if self._ended:
                raise RuntimeError(CLOSED)
            self._changes.append(change)
            self._changed.notify_all()

    def settle(self) -> bool:
        """Commits at once. Returns False if a commit failed; then call `take_failed`.

        Raises:
          RuntimeError: the thread has ended.
        """
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._error or self._ended or not (self._changes or self._busy)
            )
            self._urgent = False
            if self._ended and self._error is None:
                raise RuntimeError(CLOSED)
            return self._error is None

    @property
    def waiting(self) -> int:
        """Number of changes that no commit has begun with."""
        return len(self._changes)

    def take_failed(self) -> tuple[list[Change], OSError | None]:
        """Takes the changes that are not committed after an error, and lets commits go on.

        The caller must then forget their rows, and call `done` of each.

        Returns:
          The changes and the error; [] and None if no commit failed.
        """
        with self._changed:
            error, changes = self._error, self._changes
            if error is None:
                return [], None
            self._error, self._changes = None, []
            self._changed.notify_all()
            return changes, error

    def close(self) -> None:
        """Commits what is left, and returns when the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _run(self) -> None:
        try:
            while changes := self._next():
                error = self._commit(changes)
                if error is None:
                    finish(changes, None)
                with self._changed:
                    self._busy = False
                    if error is not None:
                        self._error, self._changes = error, changes + self._changes
                    self._changed.notify_all()
                if error is not None and not self._report():  # no worker is left to roll back
                    finish(self.take_failed()[0], error)
                del changes
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _next(self) -> list[Change]:
        """Waits for changes and takes them; [] at the end."""
        hurry = lambda: self._urgent or self._closing
        with self._changed:
            self._changed.wait_for(lambda: self._error is None and (self._changes or self._closing))
            left = self._due - time.monotonic()
            if self._changes and left > 0:
                self._changed.wait_for(hurry, left)
            self._due = time.monotonic() + self._wait
            changes, self._changes = self._changes, []
            self._busy = bool(changes)
            return changes

    def _commit(self, changes: list[Change]) -> OSError | None:
        rows: dict[User, Row | None] = {}
        clear = False
        try:
            for change in changes:
                if change.clear:
                    rows, clear = {}, True
                rows |= change.rows()
            if rows or clear:
                self._database.commit(rows, clear=clear)
        except OSError as error:
            return error
        except Exception as error:  # writers wait for the thread, so it must go on
            logging.exception("a commit failed")
            return OSError(f"{self._database.path} was not written: {error}")
        return None


def finish(changes: Sequence[Change], error: OSError | None) -> None:
    """Calls `done` of each change; an error there must not end the thread that commits."""
    for change in changes:
        try:
            change.done(error)
        except Exception:  # of one change: the others are reported, too
            logging.exception("a commit could not be reported")
