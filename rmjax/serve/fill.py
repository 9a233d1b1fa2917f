"""Fills a store with the histories of a log, so that a service knows its users from the start.

python -m rmjax.recommend --workdir=runs/shop --events=events.parquet --store=streams.lmdb
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rmjax.io.progress import Progress
from rmjax.serve.histories import Histories
from rmjax.serve.store import Streams, User

MANY = 1024  # users of one write


class Filled(NamedTuple):
    """What was written.

    Attributes:
      users: number of users whose history was written.
      items: number of items of these histories.
      present: number of users whose stream had their history already.
    """

    users: int
    items: int
    present: int


def fill(histories: Histories, store: Streams) -> Filled:
    """Writes the history of each user who has no stream yet.

    A history is written completely or not at all. A stream that equals its history, by its length
    and its last items, counts as written. So after a kill the same call writes what is missing.

    Args:
      histories: of the log.
      store: of the same model; with a database, its `capacity` is at least `MANY`.

    Returns:
      The counts.

    Raises:
      ValueError: a user has another stream, so the events would come twice; names the user and the
        cure. Or a user cannot be one of a store. Nothing was written.
      Damaged: the row of a user does not fit its checksum; nothing was written.
      OSError: the disk has no room; the users before are written.
      Stopped: the process was asked to stop; the users before are written.
    """
    progress = Progress("checking streams", len(histories), "users", 1)
    for users, items in _parts(histories):
        _missing(users, items, store)
        progress.step(len(users))
    progress.close()
    progress, written, count = Progress("writing streams", len(histories), "users", 1), 0, 0
    for users, items in _parts(histories):
        places = _missing(users, items, store)
        new = [items[place] for place in places]
        store.write([users[place] for place in places], new, [0] * len(places))
        written, count = written + len(places), count + sum(map(len, new))
        progress.step(len(users))
    progress.close()
    return Filled(written, count, len(histories) - written)


def _parts(histories: Histories) -> Iterator[tuple[list[User], list[np.ndarray]]]:
    """Users and their histories, `MANY` at a time."""
    for first in range(0, len(histories), MANY):
        part = slice(first, min(first + MANY, len(histories)))
        yield histories.users[part].to_pylist(), histories.read(part)


def _missing(users: list[User], items: list[np.ndarray], store: Streams) -> list[int]:
    """The places of users without a stream; raises ValueError for one with another stream."""
    missing = []
    for place, (user, history, end) in enumerate(zip(users, items, store.ends(users), strict=True)):
        if end is None or (end.length == 0 and len(history)):
            missing.append(place)  # the write expects that the stream is empty
        elif end.length != len(history) or not _ends_with(history, end.items):
            cause = f"user {user!r} has a stream already, of {end.length} items"
            cure = "give a new folder as --store, or forget the user first (Streams.reset)"
            raise ValueError(
                f"{cause}, which is not the history of {len(history)} items in the log. Nothing "
                f"was written for this user, since events would come twice: {cure}"
            )
    return missing


def _ends_with(history: np.ndarray, last: np.ndarray) -> bool:
    """Whether a history ends with these items."""
    return np.array_equal(history[len(history) - len(last) :], last)
