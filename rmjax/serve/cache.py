"""The rows of users on the device, and the database behind them.

With a database the device holds the rows of the users who came last. Without one it holds all.
Everything here runs in the worker's thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from rmjax.machines.live import LiveStream
from rmjax.serve import committer
from rmjax.serve.committer import Change, Committer
from rmjax.serve.database import Damaged, Database, Row, User
from rmjax.serve.programs import least
from rmjax.serve.rows import OnDevice, Packing, padded, stream_lengths
from rmjax.serve.worker import Request, Worker

_READ = 4096  # rows that are copied to the host at a time
_BACKLOG = 256  # changes that may wait for the disk; each holds its rows on the device


class StreamInfo(NamedTuple):
    """What is known of a stream."""

    length: int  # number of items
    written: float  # time of the last write, unix seconds
    bytes: int  # of its row; the same for every length


class StreamEnd(NamedTuple):
    """How a stream ends."""

    length: int  # number of items
    items: np.ndarray  # i32 [n], the last items: those behind the last full segment, or one


class Fed(NamedTuple):
    """New rows of a batch of users."""

    users: list[User]
    slots: np.ndarray  # i64 [b], of the users; beyond the last row for the rest of the batch
    rows: LiveStream  # [b, ...]


@dataclasses.dataclass(slots=True)
class _Entry:
    """A stream whose row is on the device."""

    slot: int
    writes: int  # number of writes so far
    length: int
    written: float
    saved: int  # number of writes that the database has


class Cache:
    """The streams of a store.

    Args:
      blank: an empty stream, leading axis 1; gives the shapes and dtypes.
      capacity: number of rows on the device; with a database fixed, without one at first.
      batches: numbers of rows that are read or written at once, rising.
      database: has all rows that are committed; None: the device has all rows.
      sync: see `rmjax.serve.committer`.
      worker: whose thread calls all methods.

    Attributes:
      rows: the rows on the device.
      packing: turns rows into bytes.
      committer: writes to the database; None without one.
      database: as given.
    """

    def __init__(
        self,
        blank: LiveStream,
        capacity: int,
        batches: Sequence[int],
        database: Database | None,
        sync: str,
        worker: Worker,
    ):
        self.rows, self.packing = OnDevice(blank, capacity), Packing(blank)
        self.database, self.committer = database, None
        self._blank, self._capacity, self._batches = blank, capacity, batches
        self._waits, self._worker = sync != "none", worker
        self._entries: dict[User, _Entry] = {}  # the least recently used come first
        self._free = list(range(capacity))[::-1]  # slots without a user
        self._lost: OSError | None = None  # of a commit that no caller waited for
        if database is not None:
            wait = 0.0 if sync == "each" else committer.GROUP
            self.committer = Committer(database, wait, _weakly(self._after_failure))

    # Rows on the device.

    def length(self, user: User) -> int:
        """Items of a user whom `load` was asked for."""
        entry = self._entries.get(user)
        return entry.length if entry else 0

    def reserved(self, users: Iterable[User]) -> dict[User, int]:
        """Chooses free slots for users who have none; call `load` before, which makes slots free.

        The slots stay free until `apply` gives them to the users.

        Args:
          users: different users.

        Returns:
          {user: slot} of new users.
        """
        new = [user for user in users if user not in self._entries]
        return dict(zip(new, reversed(self._free), strict=False))

    def places(
        self,
        users: Sequence[User],
        new: Mapping[User, int] | None = None,
        batch: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of users are.

        Args:
          users: at most the largest batch.
          new: slots of new users, of `reserved`.
          batch: b; None: the smallest batch that fits.

        Returns:
          Slots [b], and whether they hold a row already, bool [b]. The last slots of the batch, and
          those of unknown users, are beyond the last row.
        """
        batch = batch or least(self._batches, len(users))
        slots, known = np.full(batch, self._capacity), np.zeros(batch, bool)
        for row, user in enumerate(users):
            entry = self._entries.get(user)
            if entry is not None:
                slots[row], known[row] = entry.slot, True
            elif new is not None:
                slots[row] = new[user]
        return slots, known

    def load(self, users: Collection[User], new: bool = False) -> dict[User, Damaged]:
        """Brings the rows of users from the database to the device.

        Args:
          users: different users, at most `capacity` with a database.
          new: makes free slots for those that have no row yet.

        Returns:
          The users whose rows are damaged.
        """
        if self.database is None and not new:
            return {}
        while True:
            for user in users:
                if user in self._entries:
                    self._entries[user] = self._entries.pop(user)  # used most recently
            missing = [user for user in users if user not in self._entries]
            rows = self.database.read(missing) if self.database and missing else {}
            intact = {user: row for user, row in rows.items() if isinstance(row, Row)}
            if self._make_room(len(missing) if new else len(intact), users):
                if intact:
                    entries = [_Entry(-1, *row[:3], row.writes) for row in intact.values()]
                    payloads = [row.payload for row in intact.values()]
                    self._admit(list(intact), entries, self.packing.unpack(payloads))
                return {user: row for user, row in rows.items() if isinstance(row, Damaged)}

    def load_one(self, user: User) -> LiveStream:
        """The row of a user, [1, ...] on the host; an empty stream for an unknown user.

        Args:
          user: the user.

        Returns:
          The row.

        Raises:
          Damaged: it does not fit its checksum.
        """
        for error in self.load([user]).values():
            raise error
        rows = self.rows.take(*self.places([user]))
        row: LiveStream = jax.tree.map(lambda x: np.asarray(x)[:1], rows)
        return row

    def apply(
        self, fed: Sequence[Fed], added: Mapping[User, int], done: Callable[[OSError | None], None]
    ) -> None:
        """Puts new rows into their slots, and hands them to the committer.

        Args:
          fed: new rows; new users have the slots of `reserved`, each of them.
          added: {user: number of items that were appended}, for the users of `fed`.
          done: is called when the write may return, with the error if the rows are lost.
        """
        self._put(fed)
        count, written = len(self._entries), time.time()
        slots = {u: int(s) for b in fed for u, s in zip(b.users, b.slots, strict=False)}
        for user, items in added.items():
            entry = self._entries.setdefault(user, _Entry(slots[user], 0, 0, written, 0))
            entry.writes, entry.length = entry.writes + 1, entry.length + items
            entry.written = written
        del self._free[len(self._free) - (len(self._entries) - count) :]
        if self.committer is None:
            done(None)
            return
        if not self._waits:
            done(None)
            done = self._lose
        self.committer.add(self._change(fed, done))
        if self.committer.waiting > _BACKLOG:  # the disk is slower than the writers
            self.settle()

    def _put(self, fed: Sequence[Fed]) -> None:
        """Puts rows into their slots; if that fails half way, all streams are as before.

        Raises:
          RuntimeError: without a database, the old rows could not be put back, either.
        """
        if self.database is None:  # the device has the only copy
            old = [self.rows.take(b.slots, b.slots < self._capacity) for b in fed[:-1]]
        try:
            for batch in fed:
                self.rows.put(batch.slots, batch.rows)
        except Exception:  # of any kind: the old rows must come back before it goes on
            if self.database is None:
                self._put_back(fed, old)
            else:
                self.settle()
                self._drop([user for batch in fed for user in batch.users])
            raise

    def _put_back(self, fed: Sequence[Fed], old: Sequence[LiveStream]) -> None:
        try:
            for batch, rows in zip(fed, old, strict=False):
                self.rows.put(batch.slots, rows)
        except Exception as error:  # of any kind: the streams are no longer known to be right
            users = [user for batch in fed for user in batch.users]
            raise RuntimeError(
                f"the device failed half way through a write ({error}): the streams of {users[:5]} "
                f"and {len(users[5:])} more may be wrong: open a new store, and load a save"
            ) from error

    def _lose(self, error: OSError | None) -> None:
        """Keeps the error of writes that have returned already."""
        if error is not None:
            logging.error("writes that had returned are lost: %s", error)
            self._lost = error

    def _change(self, fed: Sequence[Fed], done: Callable[[OSError | None], None]) -> Change:
        entries = {user: self._entries[user] for batch in fed for user in batch.users}
        stamps = {user: (e.writes, e.length, e.written) for user, e in entries.items()}

        def rows() -> dict[User, Row | None]:
            made: dict[User, Row | None] = {}
            for batch in fed:
                payloads = self.packing.pack(batch.rows, len(batch.users))
                pairs = zip(batch.users, payloads, strict=True)
                made |= {user: Row(*stamps[user], payload) for user, payload in pairs}
            return made

        def settled(error: OSError | None) -> None:
            if error is None:
                for user, (writes, _, _) in stamps.items():
                    entries[user].saved = writes
            done(error)

        return Change(rows, settled)

    def _make_room(self, count: int, keep: Collection[User]) -> bool:
        """Makes `count` slots free: enlarges the arrays, or evicts rows that the database has.

        Returns:
          False if a commit failed meanwhile, and rows were dropped for this reason.
        """
        if self.database is None:
            capacity = self._capacity
            while capacity - self._capacity + len(self._free) < count:
                capacity *= 2
            if capacity > self._capacity:
                self.rows.grow(capacity)
                self._free = list(range(self._capacity, capacity))[::-1] + self._free
                self._capacity = capacity
            return True
        while (lacking := count - len(self._free)) > 0:
            clean = (
                user
                for user, entry in self._entries.items()
                if entry.saved == entry.writes and user not in keep
            )
            evicted = list(itertools.islice(clean, lacking))
            self._drop(evicted)
            if len(evicted) < lacking and self.settle() is not None:
                return False
        return True

    def _admit(self, users: Sequence[User], entries: Sequence[_Entry], rows: LiveStream) -> None:
        """Puts rows into free slots, one for all users or one each; if it fails, nobody is new."""
        slots = self._free[len(self._free) - len(users) :]
        self._fill(slots, rows)
        del self._free[len(self._free) - len(users) :]
        for user, entry, slot in zip(users, entries, slots, strict=True):
            self._entries[user] = dataclasses.replace(entry, slot=slot)

    def _drop(self, users: Sequence[User], erase: bool = False) -> None:
        """Takes the slots of users back; `erase` overwrites their rows."""
        slots = [self._entries.pop(user).slot for user in users if user in self._entries]
        if erase:
            self._fill(slots, self._blank)
        self._free += slots

    def _fill(self, slots: Sequence[int], rows: LiveStream) -> None:
        """Puts rows into slots: one row for all of them, or one each."""
        for first in range(0, len(slots), self._batches[-1]):
            part = np.array(slots[first : first + self._batches[-1]])
            batch = least(self._batches, len(part))
            place = np.pad(part, (0, batch - len(part)), constant_values=self._capacity)
            self.rows.put(place, padded(rows, first, batch))

    # The database, and all users.

    def settle(self) -> OSError | None:
        """Commits everything that was handed over; returns the error if that failed."""
        if self.committer is None or self.committer.settle():
            return None
        return self._roll_back()

    def take_lost(self) -> OSError | None:
        """The error of a commit that no caller waited for; None the next time."""
        error, self._lost = self._lost, None
        return error

    def __len__(self) -> int:
        """Number of users."""
        if self.database is None:
            return len(self._entries)
        if any(entry.saved == 0 for entry in self._entries.values()):  # the database lacks a user
            self.settle()
        return len(self.database)

    def __contains__(self, user: User) -> bool:
        """Whether a user has a stream."""
        return user in self._entries or (self.database is not None and user in self.database)

    def refuse_unknown(self, user: User) -> None:
        """Raises ValueError for a user without a stream."""
        if user not in self:
            raise ValueError(f"user {user!r} has no stream in this store: write to it first")

    def info(self, user: User) -> StreamInfo:
        """What is known of a user's stream.

        Args:
          user: a user that has a stream.

        Returns:
          Its length, the time of the last write, and its bytes.

        Raises:
          ValueError: the user has no stream, or its row is damaged.
        """
        entry = self._entries.get(user)
        if entry is not None and entry.saved != entry.writes:
            self.settle()  # a writer may ask whether a write arrived
        self.refuse_unknown(user)
        self.load_one(user)
        entry = self._entries[user]
        return StreamInfo(entry.length, entry.written, self.packing.size)

    def ends(self, users: Sequence[User]) -> dict[User, StreamEnd]:
        """How the streams of users end; the rows do not come to the device.

        Args:
          users: different users.

        Returns:
          {user: end} of those that have a stream.

        Raises:
          Damaged: the row of a user does not fit its checksum.
        """
        if self.database is None:
            have = [user for user in users if user in self._entries]
            most, parts = self._batches[-1], []
            for first in range(0, len(have), most):
                some = have[first : first + most]
                rows = self.rows.take(*self.places(some))
                parts.append(jax.tree.map(lambda x, n=len(some): np.asarray(x)[:n], rows))
            if not parts:
                return {}
            rows = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        else:
            self.settle()
            read = _intact(self.database.read(users))
            have, rows = list(read), self.packing.unpack([row.payload for row in read.values()])
        lengths, tails, sizes = stream_lengths(rows), np.asarray(rows.tail), rows.tail_len
        return {
            user: StreamEnd(length, tail[:size] if size else tail[-1:] if length else tail[:0])
            for user, length, tail, size in zip(
                have, lengths.tolist(), tails, np.asarray(sizes).tolist(), strict=True
            )
        }

    def forget(self, users: Sequence[User]) -> None:
        """Removes users, and overwrites their rows on the device.

        Args:
          users: different users that have a stream.

        Raises:
          OSError: the disk has no room; nobody was forgotten.
        """
        self._commit(dict.fromkeys(users))
        self._drop(users, erase=True)

    def copy(self, user: User, copies: Sequence[User]) -> None:
        """Gives new users copies of a user's stream.

        Args:
          user: a user that has a stream.
          copies: different users that have none.

        Raises:
          Damaged: the row of `user` does not fit its checksum.
          OSError: the disk has no room; there is no copy.
        """
        row = self.load_one(user)
        entry = self._entries[user]
        if self.database is None:
            self._make_room(len(copies), ())
            self._admit(copies, [entry] * len(copies), row)
            return
        (payload,) = self.packing.pack(row, 1)
        self._commit(dict.fromkeys(copies, Row(1, entry.length, entry.written, payload)))

    def users(self) -> Iterator[User]:
        """All users; those who come or go meanwhile may be among them or not."""
        self.settle()
        return iter(list(self._entries)) if self.database is None else self.database.users()

    def all_rows(self) -> Iterator[tuple[list[User], list[float], LiveStream]]:
        """Yields users, the times of their last writes and their rows on the host, part by part.

        Raises:
          Damaged: a row does not fit its checksum.
        """
        users = list(self.users())
        for first in range(0, len(users), _READ):
            some = users[first : first + _READ]
            if self.database is None:
                entries = [self._entries[user] for user in some]
                slots = np.array([entry.slot for entry in entries])
                rows = jax.tree.map(np.asarray, self.rows.take(slots, slots >= 0))
                yield some, [entry.written for entry in entries], rows
                continue
            intact = _intact(self.database.read(some)).values()
            rows = self.packing.unpack([row.payload for row in intact])
            yield some, [row.written for row in intact], rows

    def replace(
        self, users: Sequence[User], stamps: Sequence[tuple[int, int, float]], rows: LiveStream
    ) -> None:
        """Replaces all streams; if it fails, nothing has changed.

        Args:
          users: n users.
          stamps: n times (number of writes, length, time of the last write).
          rows: [n, ...] on the host.

        Raises:
          OSError: the disk has no room.
        """
        if self.database is not None:
            payloads = self.packing.pack(rows, len(users)) if users else []
            triples = zip(users, stamps, payloads, strict=True)
            self._commit({user: Row(*stamp, p) for user, stamp, p in triples}, clear=True)
            self._drop(list(self._entries), erase=True)
            return
        old, self._entries = self._entries, {}
        try:
            self._make_room(len(users), ())
            self._admit(users, [_Entry(-1, *stamp, stamp[0]) for stamp in stamps], rows)
            new = self._entries
        finally:
            self._entries = old
        self._drop(list(old), erase=True)
        self._entries = new

    def _commit(self, rows: Mapping[User, Row | None], clear: bool = False) -> None:
        """Commits rows at once, or raises OSError."""
        if self.committer is not None:
            self.committer.add(Change(lambda: rows, lambda _: None, clear))
            error = self.settle()
            if error is not None:
                raise error

    def _roll_back(self) -> OSError | None:
        """After a failed commit: forgets the rows that the database does not have."""
        if self.committer is None:
            return None
        changes, error = self.committer.take_failed()
        if error is not None:
            self._drop([user for user, e in self._entries.items() if e.saved != e.writes])
        committer.finish(changes, error)
        return error

    def _after_failure(self) -> bool:
        """Makes the worker roll back; called by the committer's thread."""

        def serve(requests: Sequence[Request]) -> None:
            self._roll_back()
            requests[0].future.set_result(None)

        try:
            self._worker.submit(Request(serve), urgent=True)
        except RuntimeError:  # the worker has ended
            return False
        return True


def _intact(rows: Mapping[User, Row | Damaged]) -> dict[User, Row]:
    """Rows that were read; raises the error of a damaged one."""
    intact = {}
    for user, row in rows.items():
        if isinstance(row, Damaged):
            raise row
        intact[user] = row
    return intact


def _weakly(method: Callable[[], bool]) -> Callable[[], bool]:
    """A method of an object that may be collected meanwhile; then it returns False."""
    reference = weakref.WeakMethod(method)

    def call() -> bool:
        alive = reference()
        return alive is not None and alive()

    return call
