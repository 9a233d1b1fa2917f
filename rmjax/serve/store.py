"""Live memories of many users: streams grow item by item and answer queries at any time.

    streams = Streams(task, params, store="streams.lmdb")
    streams.write(["ann", "bob"], [[3, 14, 15], [9]])  # any number of items for each user
    streams.answer(["ann"], [[26, 5]])  # [f32 [2]]: the scores of two items

Requests of many users and lengths are padded to a few shapes, and each shape is compiled once.
A stream answers as evaluation does after the same items, whatever the sizes of the writes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from rmjax.io import checkpoint
from rmjax.machines.live import LiveStream, open_stream
from rmjax.serve import committer
from rmjax.serve.cache import Cache, Fed, StreamEnd, StreamInfo
from rmjax.serve.checks import (
    Ids,
    check_rows,
    checked_ids,
    in_json,
    listed_times,
    listed_users,
    of_items,
    pairs,
    plain_users,
)
from rmjax.serve.committer import Committer
from rmjax.serve.database import Damaged, Database, User, compare
from rmjax.serve.programs import Programs, grouped, least, padded_ids
from rmjax.serve.rows import about, padded, stream_lengths
from rmjax.serve.worker import QueueFull, Request, Worker, own
from rmjax.types import Memory, Params, Task, at

__all__ = [
    "Damaged",
    "QueueFull",
    "StreamEnd",
    "StreamInfo",
    "Streams",
    "User",
    "WrongLength",
    "of_items",
]

_SAVED = ("segment_length", "machine")  # what a save says about its model
_LISTED = 1024  # users that are listed at a time
T = TypeVar("T")


class WrongLength(ValueError):
    """A stream has another length than its writer expected; nothing of the request was written.

    Attributes:
      user: whose stream it is.
      actual: items of the stream.
    """

    def __init__(self, user: User, actual: int, expected: int):
        super().__init__(
            f"user {user!r}: the stream has {actual} items, and {expected} were expected: nothing "
            "was written. Read info(user).length, and send the items that are missing"
        )
        self.user, self.actual = user, actual


class _Write(NamedTuple):
    """One entry of a request to write."""

    user: User
    items: np.ndarray  # i32 [n]
    expected: int | None  # length of the stream before


class Streams:
    """A store of live streams of one trained model: one stream for each user.

    Threads: any number of threads may call any method. Requests wait in a queue. One thread serves
    them, and merges those that fit together. Requests of one user take effect in the order in which
    they were made. `reset`, `fork`, `save` and `load` wait for all requests before them.

    Processes: a process forked from the opening process must not use the store. All methods but
    `observe` and `waiting` raise RuntimeError there. After `close` they do so, too, but for `close`
    itself. Other processes may read the database, see `rmjax.serve.database.open_readonly`.

    Args:
      task: the task of an opened `Model`, or of `rmjax.run.training.trained`. The model's streams
        must hold item ids.
      params: the parameters of the same model.
      capacity: without a store, the number of users that fit at first. It doubles when more users
        come; reading and writing rows is then compiled anew. With a store, the number of users
        whose rows stay on the device; the least recently used rows leave the device.
      batches: numbers of users that a request is padded to. Larger requests are split.
      segments: numbers of segments that a write is padded to. Longer writes are split.
      queries: numbers of queries a user that a request is padded to. Longer requests are split.
      store: path of the database that holds the streams, a folder; made if it is missing. None
        keeps the streams on the device alone. One process at a time may write to it.
      sync: when a write to a store returns. 'each': when its rows are on the disk. 'group': after
        the commit of its group; commits are 20 ms apart. 'none': once it is applied in memory. A
        kill then loses the running commit and the group that gathers behind it.
      delay: seconds; no request waits longer than this for others to be merged with.
      queue: most waiting requests; more raise QueueFull.

    Raises:
      ValueError: an option is out of range, or the model's streams do not hold item ids. Or the
        store is a URL, holds streams of another model, or is damaged; names the file and the field.
      RuntimeError: another process writes to the store.
      OSError: the store cannot be written to.
      ModuleNotFoundError: a store is given, and lmdb is not installed.
    """

    def __init__(
        self,
        task: Task,
        params: Params,
        *,
        capacity: int = 1024,
        batches: Sequence[int] = (1, 8, 64),
        segments: Sequence[int] = (1, 16),
        queries: Sequence[int] = (1, 16),
        store: str | Path | None = None,
        sync: str = "group",
        delay: float = 0.002,
        queue: int = 1024,
    ):
        task = of_items(task)
        _check_options(capacity, batches, store, sync, delay, queue)
        assert task.table is not None
        self._num_items = len(at(params, task.table))
        self._num_queries = task.answers.questions.kinds or self._num_items
        self._ranks, self._length = task.answers.ranking is not None, task.segment_length
        self._batches, self._segments = sorted(batches), sorted(segments)
        self._queries, self._capacity = sorted(queries), capacity
        self._programs, self._process = Programs(task, params), os.getpid()
        self._blank = open_stream(task.machine, params["machine"], 1, self._length)
        self._about = about(self._blank, params["machine"], self._length)
        with contextlib.ExitStack() as opened:
            kept = None if store is None else Database(store, self._about)
            if kept is not None:
                opened.callback(kept.close)
            self._worker = Worker(self._batches[-1], delay, queue)
            opened.callback(self._worker.close)
            self._cache = Cache(self._blank, capacity, self._batches, kept, sync, self._worker)
            opened.pop_all()
        self._parts = self._process, self._worker, self._cache.committer, kept
        weakref.finalize(self, _end, *self._parts).atexit = False  # `_end_all` comes earlier
        _OPEN.add(self)

    # Requests that are merged.

    def write(
        self,
        users: Sequence[User],
        items: Sequence[Ids],
        expected_lengths: Sequence[int | None] | None = None,
    ) -> list[int]:
        """Appends items to the streams of users.

        Without a store the call may return before the device has finished, see `wait`. With a
        store, `sync` says when it returns.

        Args:
          users: [n] users, each a str, bytes or an int of 64 bits. A new user gets a stream. A user
            may occur twice: the items are appended in order.
          items: n lists of indices of items, 0 .. num_items - 1, of any lengths, 0 included.
            Integers that the data call items by are other numbers: `Model.write` takes those.
          expected_lengths: n lengths that the streams must have before their items are appended; 0
            for a new user; None: any length. So a write that is made twice has effect once.

        Returns:
          n lengths, of each stream after its items.

        Raises:
          WrongLength: a stream has another length; nothing was written.
          Damaged: the row of a user does not fit its checksum; nothing was written.
          ValueError: a user is of another type; an id is not an item of the model; the lists
            differ in length; with a store, a write has more users than `capacity`. The message
            names the user and the item. Nothing was written.
          QueueFull: too many requests wait.
          OSError: the disk has no room; the streams are as the database has them.
          RuntimeError: the store is closed, or this process was forked.
        """
        return self._result(self.write_soon(users, items, expected_lengths))

    def write_soon(
        self,
        users: Sequence[User],
        items: Sequence[Ids],
        expected_lengths: Sequence[int | None] | None = None,
    ) -> Future[list[int]]:
        """As `write`, but returns at once, with the future of the lengths.

        A later write of the same user can wait in the queue while an earlier one fails, and then
        succeed without its items. With `expected_lengths` the later one fails, too.

        Args:
          users: as in `write`.
          items: as in `write`.
          expected_lengths: as in `write`.

        Returns:
          The future. Its callbacks must not wait for other requests of this store.

        Raises:
          ValueError: as `write`, but for WrongLength and Damaged, which the future raises.
          QueueFull: too many requests wait.
          RuntimeError: the store is closed, or this process was forked.
        """
        checked = pairs(users, items, "items")
        lengths = [None] * len(checked) if expected_lengths is None else list(expected_lengths)
        if len(lengths) != len(checked):
            raise ValueError(
                f"{len(checked)} users, but {len(lengths)} expected lengths: give one length, or "
                "None, for each user"
            )
        writes = [
            _Write(user, checked_ids(user, ids, self._num_items, "item"), _checked_length(user, n))
            for (user, ids), n in zip(checked, lengths, strict=True)
        ]
        count = len({write.user for write in writes})
        if self._cache.database is not None and count > self._capacity:
            raise ValueError(
                f"{count} users in one write, but capacity is {self._capacity}: write fewer users "
                "at a time, or open the store with a larger capacity"
            )
        return self._soon(self._serve_writes, "write", [w.user for w in writes], writes)

    def answer(self, users: Sequence[User], queries: Sequence[Ids]) -> list[np.ndarray]:
        """Answers queries from everything that was written so far; waits for the device.

        Args:
          users: [n] users, as in `write`. A user without a stream is answered from an empty one. A
            user may occur twice.
          queries: n lists of query ids: items in 0 .. num_items - 1, or kinds of question where the
            model is asked about kinds.

        Returns:
          n arrays on the host, one for each entry of `users`, for Q queries: logits f32 [Q]; or
          logits of every class f32 [Q, C] where the model chooses among C classes; or scores of
          every item f32 [Q, V] where the model ranks items. f32 [0] without queries.

        Raises:
          Damaged: the row of a user does not fit its checksum.
          ValueError: a user is of another type, an id is not a query of the model, or the two
            lists differ in length; names the user and the query.
          QueueFull: too many requests wait.
          RuntimeError: the store is closed, or this process was forked.
        """
        return self._result(self.answer_soon(users, queries))

    def answer_soon(
        self, users: Sequence[User], queries: Sequence[Ids]
    ) -> Future[list[np.ndarray]]:
        """As `answer`, but returns at once, with the future of the answers.

        Args:
          users: as in `answer`.
          queries: as in `answer`.

        Returns:
          The future. Its callbacks must not wait for other requests of this store.

        Raises:
          ValueError: as `answer`, but for Damaged, which the future raises.
          QueueFull: too many requests wait.
          RuntimeError: the store is closed, or this process was forked.
        """
        asked = [
            (user, checked_ids(user, query, self._num_queries, "query"))
            for user, query in pairs(users, queries, "queries")
        ]
        return self._soon(self._serve_answers, "answer", [user for user, _ in asked], asked)

    def recommend(
        self, users: Sequence[User], k: int = 10, exclude: Sequence[Ids] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks all items by everything that was written so far; waits for the device.

        A stream keeps no list of its items, so `exclude` says which ones are left out.

        Args:
          users: [n] users, as in `answer`.
          k: how many items, at most the number of items.
          exclude: n lists of item ids in 0 .. num_items - 1, of any lengths; None: all items count.

        Returns:
          Scores f32 [n, k], falling, and item ids i32 [n, k]. Where fewer than k items are left,
          the scores end with -inf and the ids with -1.

        Raises:
          Damaged: the row of a user does not fit its checksum.
          ValueError: the model does not rank items; k is out of range; a user is of another type;
            an id is not an item of the model; the two lists differ in length.
          QueueFull: too many requests wait.
          RuntimeError: the store is closed, or this process was forked.
        """
        return self._result(self.recommend_soon(users, k, exclude))

    def recommend_soon(
        self, users: Sequence[User], k: int = 10, exclude: Sequence[Ids] | None = None
    ) -> Future[tuple[np.ndarray, np.ndarray]]:
        """As `recommend`, but returns at once, with the future of scores and ids.

        Args:
          users: as in `recommend`.
          k: as in `recommend`.
          exclude: as in `recommend`.

        Returns:
          The future. Its callbacks must not wait for other requests of this store.

        Raises:
          ValueError: as `recommend`; the future raises Damaged, or that the model does not rank.
          QueueFull: too many requests wait.
          RuntimeError: the store is closed, or this process was forked.
        """
        if not self._ranks:
            raise ValueError("this model does not rank items: take one of configs/clicks.py")
        if not 1 <= k <= self._num_items:
            raise ValueError(f"k = {k}: must be from 1 to the number of items, {self._num_items}")
        entries = [
            (user, checked_ids(user, ids, self._num_items, "item"))
            for user, ids in pairs(
                users, [()] * len(users) if exclude is None else exclude, "exclude"
            )
        ]
        serve = functools.partial(self._serve_ranks, k)
        return self._soon(serve, ("rank", k), [user for user, _ in entries], entries)

    # Requests that are served alone, in their turn.

    def __len__(self) -> int:
        """Number of users that have a stream."""
        return self._call(lambda: len(self._cache))

    def __contains__(self, user: object) -> bool:
        """Whether a user has a stream."""
        try:
            (plain,) = plain_users([user])  # type: ignore[list-item]
        except ValueError:
            plain = None
        return self._call(lambda: plain is not None and plain in self._cache)

    def info(self, user: User) -> StreamInfo:
        """What is known of a user's stream.

        Args:
          user: a user that has a stream.

        Returns:
          Its length, the time of the last write, and its bytes.

        Raises:
          Damaged: the row does not fit its checksum.
          ValueError: the user has no stream.
          RuntimeError: the store is closed, or this process was forked.
        """
        (plain,) = plain_users([user])
        return self._call(lambda: self._cache.info(plain))

    def ends(self, users: Sequence[User]) -> list[StreamEnd | None]:
        """How streams end, which says whether a log was written into them already.

        Args:
          users: [n] users.

        Returns:
          n ends: the length of a stream, and its last items. These are the items behind the last
          full segment; or the last item alone, if all segments are full. None: the user has no
          stream.

        Raises:
          Damaged: the row of a user does not fit its checksum.
          ValueError: a user is of another type.
          RuntimeError: the store is closed, or this process was forked.
        """
        plain = plain_users(users)
        ends = self._call(lambda: self._cache.ends(list(dict.fromkeys(plain))))
        return [ends.get(user) for user in plain]

    def memory(self, user: User) -> Memory:
        """The memory of all items of a user, as an answer sees it.

        Args:
          user: any user; without a stream, the memory is the empty one.

        Returns:
          NumPy arrays without the batch axis.

        Raises:
          Damaged: the row does not fit its checksum.
          RuntimeError: the store is closed, or this process was forked.
        """
        (plain,) = plain_users([user])

        def read() -> Memory:
            memories = self._programs.remember(self._cache.load_one(plain))
            memory: Memory = jax.tree.map(lambda x: np.asarray(x)[0], memories)
            return memory

        return self._call(read)

    def users(self) -> Iterator[User]:
        """Yields the users that have a stream; those who come meanwhile may be among them or not.

        Raises:
          RuntimeError: the store is closed, or this process was forked.
        """
        listed = self._call(self._cache.users)
        while some := self._call(lambda: list(itertools.islice(listed, _LISTED))):
            yield from some

    def wait(self) -> None:
        """Returns when the device has finished all writes; `answer` needs no `wait` before it.

        Raises:
          RuntimeError: the store is closed, or this process was forked.
        """
        self._call(self._cache.rows.wait)

    def flush(self) -> None:
        """Returns when all writes before it would survive a power failure.

        Raises:
          ValueError: the streams are on the device alone.
          OSError: the disk has no room; or, with sync='none', writes since the last `flush` are
            lost for this reason.
          RuntimeError: the store is closed, or this process was forked.
        """

        def settled() -> None:
            if self._cache.database is None:
                raise ValueError("these streams are on the device: save(path) writes them")
            error, lost = self._cache.settle(), self._cache.take_lost()
            if error is not None or lost is not None:
                raise error or lost  # type: ignore[misc]  # one of them is an error

        self._call(settled)

    def reset(self, users: Sequence[User]) -> None:
        """Forgets users; a later write for one of them begins a new stream.

        Their rows on the device are overwritten. A database keeps old bytes in free pages until it
        uses these again; a copy by `save` never has them.

        Args:
          users: users that have a stream; if one has none, nobody is forgotten.

        Raises:
          ValueError: a user has no stream, or is of another type.
          OSError: the disk has no room; nobody was forgotten.
          RuntimeError: the store is closed, or this process was forked.
        """
        plain = list(dict.fromkeys(plain_users(users)))

        def act() -> None:
            for user in plain:
                self._cache.refuse_unknown(user)
            self._cache.forget(plain)

        self._call(act)

    def fork(self, user: User, copies: Sequence[User]) -> None:
        """Gives new users copies of one user's present stream.

        Args:
          user: a user that has a stream.
          copies: new users.

        Raises:
          Damaged: the row of `user` does not fit its checksum.
          ValueError: `user` has no stream, one of `copies` has one already, or a user is of another
            type.
          OSError: the disk has no room; there is no copy.
          RuntimeError: the store is closed, or this process was forked.
        """
        (plain,), others = plain_users([user]), list(dict.fromkeys(plain_users(copies)))

        def act() -> None:
            self._cache.refuse_unknown(plain)
            for copy in others:
                if copy in self._cache:
                    raise ValueError(f"user {copy!r} has a stream already: reset it first")
            self._cache.copy(plain, others)

        self._call(act)

    def save(self, path: str | Path) -> None:
        """Writes all streams to the directory `path`, completely or not at all.

        All rows are first copied to the host's memory. Every file gets a SHA-256 digest. An earlier
        save under the same path is replaced.

        Args:
          path: the directory; `~` stands for the home directory.

        Raises:
          Damaged: a row does not fit its checksum.
          ValueError: the path is a URL or has a character that checkpoints cannot have; or a memory
            is not finite.
          FileExistsError: the path holds something that `save` did not write.
          OSError: the disk refused; names the folder, the size and the cure.
          RuntimeError: the store is closed, or this process was forked.
        """
        self._call(lambda: self._save(path))

    def load(self, path: str | Path) -> None:
        """Replaces all streams of the store by those that `save` wrote.

        Everything is checked and written before the first old user is removed. So a load that fails
        changes nothing. Without a database, the device needs room for both sets of users.

        Args:
          path: the directory that `save` wrote; `~` stands for the home directory.

        Raises:
          FileNotFoundError: nothing was saved under this path.
          ValueError: the files are damaged or belong to another model; names the file, or the user
            and the array.
          OSError: the disk has no room for the streams.
          RuntimeError: the store is closed, or this process was forked.
        """
        self._call(lambda: self._load(path))

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return self._worker.waiting

    def observe(self, batch: Callable[[int], object]) -> None:
        """Reports the requests that are served.

        Args:
          batch: is called in the worker's thread with the number of requests of each batch.
        """
        self._worker.observe = batch

    def compile(self) -> None:
        """Compiles every shape, so that no later write or answer has to wait for the compiler.

        It compiles `recommend` for k = 10, without items to leave out.

        Raises:
          RuntimeError: the store is closed, or this process was forked.
        """
        self._call(self._compile)

    def close(self) -> None:
        """Serves all waiting requests, commits their rows, and ends.

        Afterwards only `close` may be called; the second time it does nothing. Another process can
        then open the store.

        Raises:
          OSError: the disk had no room for the last writes.
          RuntimeError: this process was forked from the one that opened the store; or a callback of
            a future called this.
        """
        self._refuse_forked()
        if _serves(*self._parts[1:3]):
            raise RuntimeError("a callback of a future must not close the store")
        _end(*self._parts)
        error = self._cache.take_lost()
        if error is not None:
            raise error

    # The queue.

    def _soon(
        self,
        serve: Callable[[Sequence[Request]], None],
        kind: Any,
        users: Sequence[User],
        content: Any,
    ) -> Future[Any]:
        self._refuse_forked()
        return self._worker.submit(Request(serve, kind, users, content, len(users)))

    def _call(self, function: Callable[[], T]) -> T:
        """Runs a function in the worker, after all requests before it, and returns its result."""

        def serve(requests: Sequence[Request]) -> None:
            try:
                requests[0].future.set_result(function())
            except Exception as error:  # the caller's thread raises it
                requests[0].future.set_exception(error)

        self._refuse_forked()
        result: T = self._result(self._worker.submit(Request(serve)))
        return result

    def _result(self, future: Future[T]) -> T:
        if _serves(self._worker, self._cache.committer):
            raise RuntimeError("a callback of a future must not wait for another request")
        return future.result()

    def _refuse_forked(self) -> None:
        """Raises RuntimeError in a forked process: it has no worker, and JAX does not work."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"process {self._process} opened these streams, and this process was forked from "
                "it: start it with multiprocessing's 'spawn' instead, and open other streams in it"
            )

    # All that follows runs in the worker's thread.

    def _serve_writes(self, requests: Sequence[Request]) -> None:
        cache = self._cache
        damaged = cache.load(dict.fromkeys(u for one in requests for u in one.users), new=True)
        outcomes, items = self._accepted(requests, damaged)
        new, longest = cache.reserved(items), self._segments[-1] * self._length
        first = {user: ids[:longest] for user, ids in items.items()}
        # If a call of the device fails here, all streams are as before.
        fed = [
            self._fed({user: items[user] for user in group}, new)
            for _, group in grouped(first, self._fills, self._batches[-1])
        ]
        added = {user: len(ids) for user, ids in items.items()}
        cache.apply(fed, added, functools.partial(_complete, outcomes))

    def _accepted(
        self, requests: Sequence[Request], damaged: Mapping[User, Damaged]
    ) -> tuple[list[_Outcome], dict[User, np.ndarray]]:
        """Checks the rows and lengths of each request, in order; refuses requests that do not fit.

        Returns:
          What to complete after the commit, and the items of each user, i32 [n].
        """
        lengths: dict[User, int] = {}
        outcomes, items = list[_Outcome](), dict[User, list[np.ndarray]]()
        for request in requests:
            after, results = lengths.copy(), []
            try:
                for user, ids, expected in request.content:
                    if user in damaged:
                        raise damaged[user]
                    length = after.get(user, self._cache.length(user))
                    if expected is not None and expected != length:
                        raise WrongLength(user, length, expected)
                    after[user] = length + len(ids)
                    results.append(after[user])
            except ValueError as error:
                # It may tell of a write that is not committed, so it waits for the commit, too.
                outcomes.append((request.future, error))
                continue
            lengths = after
            outcomes.append((request.future, results))
            for user, ids, _ in request.content:
                items.setdefault(user, []).append(ids)
        return outcomes, {user: np.concatenate(parts) for user, parts in items.items()}

    def _fed(self, items: Mapping[User, np.ndarray], new: Mapping[User, int]) -> Fed:
        """Appends items to the streams of a batch of users; the cache does not change."""
        users, left = list(items), list(items.values())
        slots, known = self._cache.places(users, new)
        rows = self._cache.rows.take(slots, known)
        longest = self._segments[-1] * self._length
        while True:
            parts = [ids[:longest] for ids in left]
            width = max(map(self._fills, parts)) * self._length
            rows = self._programs.feed(rows, *padded_ids(parts, len(slots), width))
            left = [ids[longest:] for ids in left]
            if not any(map(len, left)):
                return Fed(users, slots, rows)

    def _serve_answers(self, requests: Sequence[Request]) -> None:
        asked = [entry for request in requests for entry in request.content]
        scores: list[list[np.ndarray]] = [[] for _ in asked]
        damaged: dict[User, Damaged] = {}
        longest = self._queries[-1]
        for first in range(0, max((len(query) for _, query in asked), default=0), longest):
            parts = {
                place: query[first : first + longest]
                for place, (_, query) in enumerate(asked)
                if len(query) > first
            }
            asks = lambda query: least(self._queries, len(query))
            for width, group in grouped(parts, asks, self._batches[-1]):
                rows, batch = self._rows_of([asked[place][0] for place in group], damaged)
                query = padded_ids(list(group.values()), batch, width)
                answers = np.asarray(self._programs.answer(rows, *query))
                for row, (place, part) in enumerate(group.items()):
                    scores[place].append(answers[row, : len(part)])
        results = [np.concatenate(s) if s else np.zeros(0, np.float32) for s in scores]
        _deliver(requests, damaged, lambda part: results[part])

    def _serve_ranks(self, k: int, requests: Sequence[Request]) -> None:
        entries = [entry for request in requests for entry in request.content]
        scores, ids = np.empty((len(entries), k), np.float32), np.empty((len(entries), k), np.int32)
        damaged: dict[User, Damaged] = {}
        parts = dict(enumerate(exclude for _, exclude in entries))
        power = lambda part: 1 << max(0, len(part) - 1).bit_length()
        for width, group in grouped(parts, power, self._batches[-1]):
            rows, batch = self._rows_of([entries[place][0] for place in group], damaged)
            left_out = padded_ids(list(group.values()), batch, width)
            best = self._programs.rank(rows, *left_out, k=k)
            for all_rows, part in zip((scores, ids), best, strict=True):
                all_rows[list(group)] = np.asarray(part)[: len(group)]
        _deliver(requests, damaged, lambda part: (scores[part], ids[part]))

    def _rows_of(
        self, users: Sequence[User], damaged: dict[User, Damaged]
    ) -> tuple[LiveStream, int]:
        """The rows [b, ...] of users, and b; adds the users to `damaged` whose rows are."""
        damaged |= self._cache.load(dict.fromkeys(users))
        slots, known = self._cache.places(users)
        return self._cache.rows.take(slots, known), len(slots)

    def _save(self, path: str | Path) -> None:
        users: list[User] = []
        written: list[float] = []
        parts = []
        for some, times, rows in self._cache.all_rows():
            users += some
            written += times
            parts.append(rows)
        tree = jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else {}
        self._check_rows(tree, users, "cannot be saved")
        saved = {name: self._about[name] for name in _SAVED}
        saved |= {"users": in_json(users), "written": written}
        checkpoint.save_tree(path, tree, {"streams": saved})

    def _load(self, path: str | Path) -> None:
        users: list[User] = []
        written: list[float] = []

        def like(manifest: dict[str, Any]) -> Params:
            saved = manifest.get("streams")
            if not isinstance(saved, dict):
                raise ValueError(f"{path} holds no streams: give a path that save() wrote")
            compare(saved, {name: self._about[name] for name in _SAVED}, path)
            users.extend(listed_users(saved, path))
            written.extend(listed_times(saved, path, len(users)))
            count = len(users)
            shape: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct
            row = lambda x: shape((count, *x.shape[1:]), x.dtype)
            return jax.tree.map(row, self._blank) if count else {}

        rows = checkpoint.load_tree(path, like)
        self._check_rows(rows, users, f"{path} is damaged")
        lengths = stream_lengths(rows).tolist() if users else []
        stamps = [(1, n, when) for n, when in zip(lengths, written, strict=True)]
        self._cache.replace(users, stamps, rows)

    def _check_rows(self, rows: Params, users: Sequence[User], what: str) -> None:
        check_rows(rows, users, {"tail": self._num_items, "tail_len": self._length}, what)

    def _compile(self) -> None:
        cache, programs = self._cache, self._programs
        for batch in self._batches:
            nobody, known = cache.places((), batch=batch)
            cache.rows.put(nobody, padded(self._blank, 0, batch))  # as for rows from the database
            rows = cache.rows.take(nobody, known)
            for segments in self._segments:
                ids = np.zeros((batch, segments * self._length), np.int32)
                cache.rows.put(nobody, programs.feed(rows, ids, ids > 0))
            for queries in self._queries:
                ids = np.zeros((batch, queries), np.int32)
                np.asarray(programs.answer(rows, ids, ids > 0))
            if self._ranks:
                ids = np.zeros((batch, 1), np.int32)
                jax.tree.map(
                    np.asarray, programs.rank(rows, ids, ids > 0, k=min(10, self._num_items))
                )
        jax.tree.map(np.asarray, programs.remember(self._blank))

    def _fills(self, ids: np.ndarray) -> int:
        """Number of segments that a write is padded to; `feed` adds room for the tail."""
        return least(self._segments, -(-len(ids) // self._length))


_Outcome = tuple[Future[list[int]], list[int] | ValueError]  # of a write; lengths after it


def _check_options(
    capacity: int,
    batches: Sequence[int],
    store: str | Path | None,
    sync: str,
    delay: float,
    queue: int,
) -> None:
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    if store is not None and capacity < max(batches):
        raise ValueError(
            f"capacity = {capacity}: with a store it must be at least the largest batch, "
            f"{max(batches)}"
        )
    if sync not in committer.SYNCS:
        raise ValueError(f"sync = {sync!r}: must be one of {', '.join(committer.SYNCS)}")
    if delay < 0 or queue < 1:
        raise ValueError(f"{delay=}, {queue=}: need delay >= 0 and queue >= 1")


def _checked_length(user: User, length: Any) -> int | None:
    """A length that a writer expects, or None."""
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 0:
        raise ValueError(
            f"user {user!r}: the expected length {length!r} is no whole number >= 0: give the "
            "length of the stream before the write, or None for any length"
        )
    return int(length)


def _deliver(
    requests: Sequence[Request],
    damaged: Mapping[User, Damaged],
    result: Callable[[slice], Any],
) -> None:
    """Completes requests: each with the results of its entries, or the error of a damaged row."""
    first = 0
    for request in requests:
        part = slice(first, first + len(request.content))
        first = part.stop
        errors = [damaged[user] for user in request.users if user in damaged]
        if errors:
            request.future.set_exception(own(errors[0]))
        else:
            request.future.set_result(result(part))


def _complete(outcomes: Sequence[_Outcome], error: OSError | None) -> None:
    """Completes writes; each gets an error of its own, since threads add their traces to it."""
    for future, outcome in outcomes:
        if error is not None:
            future.set_exception(own(error))
        elif isinstance(outcome, ValueError):
            future.set_exception(own(outcome))
        else:
            future.set_result(outcome)


def _serves(worker: Worker, committing: Committer | None) -> bool:
    """Whether the current thread is one of the two of a store."""
    return threading.current_thread() in (worker.thread, committing and committing.thread)


def _end(process: int, worker: Worker, committing: Committer | None, base: Database | None) -> None:
    """Serves what waits and commits it; in a forked process there is nothing to end."""
    if os.getpid() == process:
        if _serves(worker, committing):  # the last request held the store; no thread joins itself
            parts = process, worker, committing, base
            threading.Thread(target=_end, args=parts, name="streams-end").start()
            return
        worker.close()
        if committing is not None:
            committing.close()
        if base is not None:
            base.close()


_OPEN: weakref.WeakSet[Streams] = weakref.WeakSet()


@atexit.register  # after JAX's own, so that it runs before it
def _end_all() -> None:
    for streams in list(_OPEN):
        _end(*streams._parts)
