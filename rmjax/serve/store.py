"""Live memories of many users: streams grow item by item and answer queries at any time.

    streams = Streams(task, params)
    streams.write(["ann", "bob"], [[3, 14, 15], [9]])  # any number of items for each user
    streams.answer(["ann"], [[26, 5]])  # [f32 [2]]: the scores of two items

Requests of many users and lengths are padded to a few shapes, and each shape is compiled once.
A stream answers as evaluation does after the same items, whatever the sizes of the writes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.io import atomic, checkpoint
from rmjax.io.paths import resolve
from rmjax.io.text import read_json
from rmjax.machines.live import LiveStream, current_memory, feed, open_stream
from rmjax.run.workdir import lock
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Array, Params, Task, at

Ids = Sequence[int] | np.ndarray  # one flat list of whole numbers
User = str | int  # an int of 64 bits
_INDEX = "index.json"
_CURE = "restore it from a copy, or load saved streams into another folder"
_SAVED_ROWS = 4096  # rows that `save` copies to the host at a time
K = TypeVar("K", bound=User)
P = ParamSpec("P")
T = TypeVar("T")


def _one_at_a_time(
    method: Callable[Concatenate[Streams, P], T],
) -> Callable[Concatenate[Streams, P], T]:
    """Makes threads take turns in a method; refuses closed stores and forked processes."""

    @functools.wraps(method)
    def call(self: Streams, *args: P.args, **kwargs: P.kwargs) -> T:
        self._refuse_forked()
        with self._lock:
            if self._closed:
                raise RuntimeError("these streams are closed: open them again with Streams(...)")
            return method(self, *args, **kwargs)

    return call


class OnDevice:
    """Rows of streams as arrays on the device; row i belongs to slot i.

    Args:
      blank: an empty stream, leading axis 1; gives the shapes and dtypes.
      capacity: number of rows.
    """

    def __init__(self, blank: LiveStream, capacity: int):
        self.rows: LiveStream = jax.tree.map(
            lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), blank
        )

    def take(self, slots: np.ndarray) -> LiveStream:
        """Returns the rows of slots [b]; a slot beyond the last row gives the last row."""
        rows: LiveStream = _take(self.rows, slots)
        return rows

    def put(self, slots: np.ndarray, rows: LiveStream) -> None:
        """Writes rows [b, ...] to slots [b]; slots beyond the last row are skipped."""
        self.rows = _put(self.rows, slots, rows)

    def wait(self) -> None:
        """Returns when the device has finished every `put`."""
        jax.block_until_ready(self.rows)  # type: ignore[no-untyped-call]

    def grow(self, capacity: int) -> None:
        """Appends rows up to the new capacity."""
        more = lambda x: jnp.concatenate([x, jnp.zeros((capacity - len(x), *x.shape[1:]), x.dtype)])
        self.rows = jax.tree.map(more, self.rows)


class InFiles:
    """Rows of streams as memory-mapped files: for more users than a device can hold.

    Each array of a stream has one file. The files hold the rows of the last `flush`, or later rows.

    Args:
      blank: an empty stream, leading axis 1; gives the shapes and dtypes.
      capacity: number of rows.
      folder: the folder of the files.
      expected: number of rows that the files must already have.

    Raises:
      ValueError: a file has fewer than `expected` rows; names the file.
      OSError: the disk has no room for the rows; names the size and the folder.
    """

    def __init__(self, blank: LiveStream, capacity: int, folder: Path, expected: int = 0):
        self._folder = folder
        self._blank = {
            jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in _leaves(blank)
        }
        self._structure = jax.tree.structure(blank)
        self._sizes = {  # bytes of one row
            name: x.dtype.itemsize * int(np.prod(x.shape[1:])) for name, x in self._blank.items()
        }
        for name, size in self._sizes.items():
            path = self._path(name)
            actual = path.stat().st_size if path.exists() else 0
            if actual < expected * size:
                raise ValueError(f"{path} has {actual} of {expected * size} bytes: {_CURE}")
        self.grow(capacity)

    def take(self, slots: np.ndarray) -> LiveStream:
        """Returns the rows of slots [b]; a slot beyond the last row gives the last row."""
        places = np.minimum(slots, self._capacity - 1)
        rows: LiveStream = jax.tree.unflatten(
            self._structure, [file[places] for file in self._files]
        )
        return rows

    def put(self, slots: np.ndarray, rows: LiveStream) -> None:
        """Writes rows [b, ...] to slots [b]; slots beyond the last row are skipped."""
        inside = slots < self._capacity
        for file, new in zip(self._files, jax.tree.leaves(rows), strict=True):
            file[slots[inside]] = np.asarray(new)[inside]

    def wait(self) -> None:
        """Returns at once: `put` has already waited for the rows."""

    def grow(self, capacity: int) -> None:
        """Enlarges the files to the new capacity and maps them into memory.

        Args:
          capacity: number of rows; at least the present number.

        Raises:
          OSError: the disk has no room; names the size and the folder.
        """
        for name, size in self._sizes.items():
            try:
                with self._path(name).open("ab") as file:
                    # Reserve the space now: a later write to a full disk would kill the process.
                    os.posix_fallocate(file.fileno(), 0, capacity * size)
                    os.fsync(file.fileno())
            except OSError as error:
                total = capacity * sum(self._sizes.values())
                raise OSError(
                    f"{capacity} streams need {total:,} bytes in {self._folder} "
                    f"({error.strerror}): free space, or give another folder"
                ) from error
        atomic.sync(self._folder)
        self._files = [
            np.memmap(self._path(name), x.dtype, "r+", shape=(capacity, *x.shape[1:]))
            for name, x in self._blank.items()
        ]
        self._capacity = capacity

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.bin"

    def flush(self) -> None:
        """Returns when the rows would survive a power failure.

        Raises:
          OSError: a file could not be written; names the file, the size and the cure.
        """
        for name, file in zip(self._blank, self._files, strict=True):
            try:
                file.flush()
            except OSError as error:
                raise atomic.explained(error, self._path(name), file.nbytes) from error


class Streams:
    """A store of live streams of one trained model: one stream for each user.

    Threads: any number of threads may call any method. A lock lets one call run at a time, so each
    call sees all effects of the calls before. Two calls for one user take effect in the order in
    which they get the lock: a caller who needs an order must wait for the first call to return.

    Processes: a process forked from the opening process must not use the store. All methods raise
    RuntimeError in a forked process. After `close`, all methods but `close` raise it too.

    Args:
      task: the task of an opened `Model`, or of `rmjax.run.training.trained`. The model's streams
        must hold item ids.
      params: the parameters of the same model.
      capacity: number of users that fit at first. It doubles when more users come; on the
        device, reading and writing rows is then compiled anew.
      batches: numbers of users that a request is padded to. Larger requests are split.
      segments: numbers of segments that a write is padded to. Longer writes are split.
      queries: numbers of queries a user that a request is padded to. Longer requests are split.
      folder: folder of the files that hold the streams; None keeps the streams on the device. A
        folder with streams of the same model is opened as the last `flush` left it. One store at a
        time owns a folder, until `close`.

    Raises:
      ValueError: capacity is below 1, or the model's streams do not hold item ids. Or the folder is
        a URL, holds streams of another model, or is damaged; names the file and the field.
      RuntimeError: another store owns the folder.
      OSError: the disk has no room for the rows; the error says how many bytes they need.
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
        folder: str | Path | None = None,
    ):
        task = of_items(task)
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        assert task.table is not None
        self._num_items = len(at(params, task.table))
        self._num_queries = task.answers.questions.kinds or self._num_items
        self._params, self._length = jax.device_put(params), task.segment_length
        self._batches, self._segments = sorted(batches), sorted(segments)
        self._queries = sorted(queries)
        machine = task.machine
        self._blank = open_stream(machine, params["machine"], 1, self._length)
        self._slots: dict[User, int] = {}
        self._free: list[int] = []
        self._released: list[int] = []  # slots of removed users in files; `flush` frees them
        self._used = 0  # slots that ever had a user
        self._lock, self._process, self._closed = threading.RLock(), os.getpid(), False
        self._capacity = capacity
        self._folder = None if folder is None else resolve(folder, "folder")
        self._store: OnDevice | InFiles
        with contextlib.ExitStack() as held:
            if self._folder is None:
                self._store = OnDevice(self._blank, capacity)
            else:
                held.enter_context(lock(self._folder))
                index = self._read_index(self._folder / _INDEX)
                self._slots = dict(zip(index["users"], index["slots"], strict=True))
                self._capacity = max(capacity, index["capacity"])
                self._used = max(index["slots"], default=-1) + 1
                # Files first: they refuse a wrong capacity before it costs memory below.
                self._store = InFiles(self._blank, self._capacity, self._folder, index["capacity"])
                self._free = sorted(set(range(self._used)) - set(index["slots"]))
                self._fill(index["erase"], self._blank)
            self._held = held.pop_all()

        @jax.jit
        def feed_rows(params: Params, rows: LiveStream, items: Array, mask: Array) -> LiveStream:
            return feed(machine, params["machine"], rows, items, mask)

        @jax.jit
        def answer_rows(params: Params, rows: LiveStream, query: Array, mask: Array) -> Array:
            memory = current_memory(machine, params["machine"], rows)
            return task.answer(params, memory, task.answers.asked_live(rows, query), mask)

        @functools.partial(jax.jit, static_argnames="k")
        def rank_rows(
            params: Params, rows: LiveStream, exclude: Array, mask: Array, *, k: int
        ) -> tuple[Array, Array]:
            memory = current_memory(machine, params["machine"], rows)
            query = task.answers.asked_live(rows, jnp.zeros((len(exclude), 1), jnp.int32))
            left_out = jnp.where(mask, exclude, -1)
            scores, ids = task.top_k(params, memory, query, query == query, k, left_out)
            return scores[:, 0], ids[:, 0]

        self._feed: Callable[..., LiveStream] = functools.partial(feed_rows, self._params)
        self._answer: Callable[..., Array] = functools.partial(answer_rows, self._params)
        self._rank: Callable[..., tuple[Array, Array]] = functools.partial(rank_rows, self._params)

    @_one_at_a_time
    def __len__(self) -> int:
        """Number of users that have a stream."""
        return len(self._slots)

    @_one_at_a_time
    def __contains__(self, user: object) -> bool:
        """Whether a user has a stream."""
        return user in self._slots

    @_one_at_a_time
    def write(self, users: Sequence[User], items: Sequence[Ids]) -> None:
        """Appends items to the streams of users.

        The call may return before the device has finished, see `wait`. If it raises ValueError,
        nothing was written.

        Args:
          users: [n] users, each a str or an int of 64 bits. A new user gets a stream. A user may
            occur twice: the items are appended in order.
          items: n lists of indices of items, 0 .. num_items - 1, of any lengths, 0 included.
            Integers that the data call items by are other numbers: `Model.write` takes those.

        Raises:
          ValueError: a user is neither str nor int, an id is not an item of the model, or the two
            lists differ in length; names the user and the item.
          OSError: the disk has no room for more users; nothing was written.
          RuntimeError: the store is closed, or this process was forked.
        """
        parts: dict[User, list[np.ndarray]] = {}
        for user, more in _pairs(users, items, "items"):
            parts.setdefault(user, []).append(self._checked(user, more, self._num_items, "item"))
        left = {user: np.concatenate(ids) for user, ids in parts.items() if sum(map(len, ids))}
        self._open([user for user in parts if user not in self._slots])
        longest = self._segments[-1] * self._length
        while left:
            first = {user: ids[:longest] for user, ids in left.items()}
            for shape, group in self._grouped(first, self._fills):
                slots, ids, mask = self._padded(group, shape * self._length, self._slots)
                self._store.put(slots, self._feed(self._store.take(slots), ids, mask))
            left = {user: ids[longest:] for user, ids in left.items() if len(ids) > longest}

    @_one_at_a_time
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
          ValueError: a user is neither str nor int, an id is not a query of the model, or the two
            lists differ in length; names the user and the query.
          RuntimeError: the store is closed, or this process was forked.
        """
        pairs = _pairs(users, queries, "queries")
        asked = [self._checked(*pair, self._num_queries, "query") for pair in pairs]
        places = {
            place: self._slots.get(user, self._capacity) for place, (user, _) in enumerate(pairs)
        }
        scores: list[list[np.ndarray]] = [[] for _ in asked]
        longest = self._queries[-1]
        for first in range(0, max(map(len, asked), default=0), longest):
            parts = {
                k: query[first : first + longest]
                for k, query in enumerate(asked)
                if len(query) > first
            }
            for shape, group in self._grouped(parts, self._asks):
                slots, query, mask = self._padded(group, shape, places)
                answers = np.asarray(self._answer(self._opened(slots), query, mask))
                for row, (place, part) in enumerate(group.items()):
                    scores[place].append(answers[row, : len(part)])
        return [np.concatenate(parts) if parts else np.zeros(0, np.float32) for parts in scores]

    @_one_at_a_time
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
          ValueError: the model does not rank items, k is out of range, a user is neither str nor
            int, an id is not an item of the model, or the two lists differ in length.
          RuntimeError: the store is closed, or this process was forked.
        """
        if not 1 <= k <= self._num_items:
            raise ValueError(f"k = {k}: must be from 1 to the number of items, {self._num_items}")
        pairs = _pairs(users, [()] * len(users) if exclude is None else exclude, "exclude")
        parts = dict(enumerate(self._checked(*pair, self._num_items, "item") for pair in pairs))
        places = {
            place: self._slots.get(user, self._capacity) for place, (user, _) in enumerate(pairs)
        }
        scores, ids = np.empty((len(pairs), k), np.float32), np.empty((len(pairs), k), np.int32)
        width = lambda part: 1 << max(0, len(part) - 1).bit_length()
        for shape, group in self._grouped(parts, width):
            slots, left_out, mask = self._padded(group, shape, places)
            best = self._rank(self._opened(slots), left_out, mask, k=k)
            for all_rows, part in zip((scores, ids), best, strict=True):
                all_rows[list(group)] = np.asarray(part)[: len(group)]
        return scores, ids

    @_one_at_a_time
    def wait(self) -> None:
        """Returns when the device has finished all writes; `answer` needs no `wait` before it.

        Raises:
          RuntimeError: the store is closed, or this process was forked.
        """
        self._store.wait()

    @_one_at_a_time
    def reset(self, users: Sequence[User]) -> None:
        """Forgets users; a later write for one of them begins a new stream.

        The bytes of their memories are overwritten. On the device this happens at once. In files
        the next `flush` does it, since until then a crash brings the users back.

        Args:
          users: users that have a stream; if one has none, nobody is forgotten.

        Raises:
          ValueError: a user has no stream, or is neither str nor int.
          RuntimeError: the store is closed, or this process was forked.
        """
        known = list(dict.fromkeys(map(self._known, _plain(users))))
        self._release([self._slots.pop(user) for user in known])

    @_one_at_a_time
    def fork(self, user: User, copies: Sequence[User]) -> None:
        """Gives new users copies of one user's present stream.

        Args:
          user: a user that has a stream.
          copies: new users.

        Raises:
          ValueError: `user` has no stream, one of `copies` has one already, or a user is neither
            str nor int.
          OSError: the disk has no room for more users.
          RuntimeError: the store is closed, or this process was forked.
        """
        (user,), copies = _plain([user]), list(dict.fromkeys(_plain(copies)))
        source = self._slots[self._known(user)]
        taken = [copy for copy in copies if copy in self._slots]
        if taken:
            raise ValueError(f"user {taken[0]!r} has a stream already: reset it first")
        self._open(copies, self._store.take(np.array([source])))

    @_one_at_a_time
    def save(self, path: str | Path) -> None:
        """Writes all streams to the directory `path`, completely or not at all.

        All rows are first copied to the host's memory. Every file gets a SHA-256 digest. An earlier
        save under the same path is replaced.

        Args:
          path: the directory; `~` stands for the home directory.

        Raises:
          ValueError: the path is a URL or has a character that checkpoints cannot have; or a memory
            is not finite.
          FileExistsError: the path holds something that `save` did not write.
          OSError: the disk refused; names the folder, the size and the cure.
          RuntimeError: the store is closed, or this process was forked.
        """
        users = list(self._slots)
        slots = np.fromiter(self._slots.values(), np.int64, len(users))
        parts = [
            jax.tree.map(np.asarray, self._store.take(slots[first : first + _SAVED_ROWS]))
            for first in range(0, len(slots), _SAVED_ROWS)
        ]
        rows = jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else {}
        self._check_rows(rows, users, "cannot be saved")
        checkpoint.save_tree(path, rows, {"streams": self._about | {"users": users}})

    @_one_at_a_time
    def load(self, path: str | Path) -> None:
        """Replaces all streams of the store by those that `save` wrote.

        Everything is checked and written before the first old user is removed. So a load that fails
        changes nothing. The store needs room for both sets of users; `reset` makes room.

        Args:
          path: the directory that `save` wrote; `~` stands for the home directory.

        Raises:
          FileNotFoundError: nothing was saved under this path.
          ValueError: the files are damaged or belong to another model; names the file, or the user
            and the array.
          OSError: the disk has no room for the streams.
          RuntimeError: the store is closed, or this process was forked.
        """
        users: list[User] = []

        def like(manifest: dict[str, Any]) -> Params:
            about = manifest.get("streams")
            self._check(about, path)
            users.extend(_listed(about, path))
            count = len(users)
            shape: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct
            row = lambda x: shape((count, *x.shape[1:]), x.dtype)
            return jax.tree.map(row, self._blank) if count else {}

        rows = checkpoint.load_tree(path, like)
        self._check_rows(rows, users, f"{path} is damaged")
        old, self._slots = self._slots, {}
        try:
            self._open(users, rows)
        except BaseException:
            self._slots = old
            raise
        self._release(list(old.values()))

    @_one_at_a_time
    def flush(self) -> None:
        """Makes the files survive a power failure: afterwards they hold all streams of the store.

        After a crash, the folder opens with the users of the last `flush`. If one of them was
        written to since, that memory may be the one at the flush or the one at the crash. It may
        also be torn, if the crash came during a write. Only `save` keeps a state for good.

        Raises:
          ValueError: the streams are on the device.
          OSError: a file could not be written; names the file, the size and the cure. `flush` may
            be called again.
          RuntimeError: the store is closed, or this process was forked.
        """
        if self._folder is None or not isinstance(self._store, InFiles):
            raise ValueError("these streams are on the device: save(path) writes them")
        self._store.flush()
        index = {
            "users": list(self._slots),
            "slots": list(self._slots.values()),
            "capacity": self._capacity,
        }
        index |= self._about | {"erase": self._released}
        atomic.write(self._folder / _INDEX, json.dumps(index | {"sha256": _digest(index)}))
        # A crash before this line is harmless: opening the folder erases the same slots.
        self._fill(self._released, self._blank)
        self._free, self._released = self._free + self._released, []

    def close(self) -> None:
        """Flushes streams in files, and lets another store open the folder.

        The folder is released even if `flush` fails. Afterwards only `close` may be called; the
        second time it does nothing.

        Raises:
          OSError: a file could not be written, see `flush`.
          RuntimeError: this process was forked from the one that opened the store.
        """
        self._refuse_forked()
        with self._lock:
            try:
                if self._folder is not None and not self._closed:
                    self.flush()
            finally:
                self._closed = True
                self._held.close()

    @_one_at_a_time
    def compile(self) -> None:
        """Compiles every shape at once, so that no later request has to wait for the compiler.

        Raises:
          RuntimeError: the store is closed, or this process was forked.
        """
        for batch in self._batches:
            nobody = np.full(batch, self._capacity)
            self._store.put(nobody, _repeated(self._blank, batch))  # as `_fill` does for new users
            for segments in self._segments:
                ids = np.zeros((batch, segments * self._length), np.int32)
                self._store.put(nobody, self._feed(self._store.take(nobody), ids, ids > 0))
            for queries in self._queries:
                ids = np.zeros((batch, queries), np.int32)
                answers = self._answer(self._opened(nobody), ids, ids > 0)
                jax.block_until_ready(answers)  # type: ignore[no-untyped-call]

    # Shared by the requests.

    def _checked(self, user: User, ids: Ids, below: int, name: str) -> np.ndarray:
        """Returns a user's ids as i32 [n], or raises ValueError; `name` is 'item' or 'query'."""
        names = {"item": "items", "query": "queries"}[name]
        flat = f"user {user!r}: {names} must be one flat list"
        try:
            array = np.asarray(ids)
        except ValueError as error:  # nested lists of different lengths
            raise ValueError(f"{flat} of whole numbers") from error
        if array.ndim > 1:
            raise ValueError(f"{flat}, got shape {array.shape}")
        array = array.reshape(-1)
        if array.size and array.dtype.kind not in "iu":
            cure = ""
            if array.dtype.kind in "OSU" and name == "item":
                cure = (
                    ", the index of an item: model.write and model.recommend take ids of the data"
                )
            raise ValueError(
                f"user {user!r}: each {name} must be a whole number, got {array.dtype}{cure}"
            )
        wrong = array[(array < 0) | (array >= below)]
        if wrong.size:
            raise ValueError(
                f"user {user!r}: {name} {wrong[0]} is outside the model's range 0 .. {below - 1}"
            )
        return array.astype(np.int32)

    def _known(self, user: User) -> User:
        """Returns the user, or raises ValueError if the user has no stream."""
        if user not in self._slots:
            raise ValueError(f"user {user!r} has no stream in this store")
        return user

    def _fills(self, ids: np.ndarray) -> int:
        """Number of segments that a write is padded to; `feed` adds room for the tail."""
        return next(n for n in self._segments if len(ids) <= n * self._length)

    def _asks(self, query: np.ndarray) -> int:
        """Number of queries that a request is padded to."""
        return next(n for n in self._queries if len(query) <= n)

    def _grouped(
        self, requests: Mapping[K, np.ndarray], shape_of: Callable[[np.ndarray], int]
    ) -> Iterator[tuple[int, dict[K, np.ndarray]]]:
        """Yields (shape, requests of this shape), at most the largest batch at a time."""
        by_shape: dict[int, list[tuple[K, np.ndarray]]] = {}
        for key, request in requests.items():
            by_shape.setdefault(shape_of(request), []).append((key, request))
        most = self._batches[-1]
        for shape, group in sorted(by_shape.items()):
            for first in range(0, len(group), most):
                yield shape, dict(group[first : first + most])

    def _padded(
        self, group: Mapping[K, np.ndarray], width: int, slots: Mapping[K, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns slots [b], ids [b, width], mask [b, width]; b is the smallest batch that fits."""
        batch = next(b for b in self._batches if len(group) <= b)
        place, ids = np.full(batch, self._capacity), np.zeros((batch, width), np.int32)
        mask = np.zeros((batch, width), bool)
        for row, (key, part) in enumerate(group.items()):
            place[row], ids[row, : len(part)], mask[row, : len(part)] = slots[key], part, True
        return place, ids, mask

    def _opened(self, slots: np.ndarray) -> LiveStream:
        """Rows of slots [b], to be read; slot == capacity gives the empty stream."""
        rows = self._store.take(slots)
        opened: LiveStream = _or_blank(rows, slots < self._capacity, self._blank)
        return opened

    def _open(self, users: Sequence[User], rows: LiveStream | None = None) -> None:
        """Gives new users slots and rows: one row for all, one each, or None for empty streams.

        If it fails, nobody is new, and no slot of another user has changed.
        """
        reused, capacity = self._free[: len(users)], self._capacity
        used = self._used + len(users) - len(reused)
        while used > capacity:
            capacity *= 2
        if capacity > self._capacity:
            self._store.grow(capacity)
            self._capacity = capacity
        slots = reused + list(range(self._used, used))
        self._fill(slots, self._blank if rows is None else rows)
        self._free, self._used = self._free[len(users) :], used
        self._slots |= dict(zip(users, slots, strict=True))

    def _fill(self, slots: Sequence[int], rows: LiveStream) -> None:
        """Puts rows into slots: one row for all of them, or one each."""
        for first in range(0, len(slots), self._batches[-1]):
            part = np.array(slots[first : first + self._batches[-1]])
            batch = next(b for b in self._batches if len(part) <= b)
            place = np.pad(part, (0, batch - len(part)), constant_values=self._capacity)
            of_part = jax.tree.map(lambda x: x[first : first + batch] if len(x) > 1 else x, rows)  # noqa: B023
            self._store.put(place, _repeated(of_part, batch))

    def _release(self, slots: list[int]) -> None:
        """Takes slots back from users."""
        if self._folder is not None:
            self._released += slots
            return
        self._fill(slots, self._blank)
        self._free += slots

    def _refuse_forked(self) -> None:
        """Raises RuntimeError in a forked process: the lock may be held, and JAX does not work."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"process {self._process} opened these streams, and this process was forked from "
                "it: start it with multiprocessing's 'spawn' instead, and open other streams in it"
            )

    def _read_index(self, path: Path) -> dict[str, Any]:
        """Reads the index that `flush` wrote and checks every field; without a file: no users."""
        if not path.exists():
            return {"users": [], "slots": [], "capacity": 0, "erase": []}
        index = read_json(path)
        if not isinstance(index, dict):
            raise ValueError(f"{path} is not an index of streams: {_CURE}")
        digest = index.pop("sha256", None)  # indexes of earlier versions have none
        if digest is not None and digest != _digest(index):
            raise ValueError(f"{path}: the digest does not fit the content: {_CURE}")
        self._check(index, path)
        users, slots, capacity = _listed(index, path), index.get("slots"), index.get("capacity")
        if type(capacity) is not int or capacity < 1:
            raise ValueError(
                f"{path}: capacity is {capacity!r}: it must be a whole number, at least 1. {_CURE}"
            )
        if not isinstance(slots, list) or len(slots) != len(users):
            count = len(slots) if isinstance(slots, list) else "no"
            raise ValueError(f"{path}: {len(users)} users, but {count} slots: {_CURE}")
        taken: set[int] = set()
        for name, listed in (("slots", slots), ("erase", index.setdefault("erase", []))):
            for place, slot in enumerate(listed):
                if type(slot) is not int or not 0 <= slot < capacity or slot in taken:
                    rule = f"slots are different whole numbers in 0 .. {capacity - 1}"
                    raise ValueError(f"{path}: {name}[{place}] is {slot!r}, but {rule}: {_CURE}")
                taken.add(slot)
        return index

    def _check_rows(self, rows: Params, users: Sequence[User], what: str) -> None:
        """Raises ValueError if a row cannot be a stream; names the user and the array."""
        below = {"tail": self._num_items, "tail_len": self._length}
        for path, leaf in _leaves(rows):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                wrong, least = ~np.isfinite(leaf), ""
            elif leaf.dtype == bool:
                continue
            else:
                most = below.get(name, np.iinfo(leaf.dtype).max)
                wrong, least = (leaf < 0) | (leaf >= most), f", outside 0 .. {most - 1}"
            if wrong.any():
                place = tuple(np.argwhere(wrong)[0])
                raise ValueError(
                    f"{what}: user {users[place[0]]!r}: {name} holds {leaf[place]}{least}"
                )

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        """What memories depend on: the segment length and a digest of the machine's parameters."""
        digest = hashlib.sha256()
        for _, leaf in _leaves(self._params["machine"]):
            digest.update(np.asarray(leaf).tobytes())
        return {"segment_length": self._length, "machine": digest.hexdigest()[:16]}

    def _check(self, about: object, path: str | Path) -> None:
        """Raises ValueError unless `about` describes streams of this model."""
        if not isinstance(about, dict):
            raise ValueError(f"{path} holds no streams")
        wanted = self._about
        other = [name for name, value in wanted.items() if about.get(name) != value]
        if other:
            shown = "; ".join(
                f"{name} {about.get(name)!r}, this model has {wanted[name]!r}" for name in other
            )
            raise ValueError(
                f"{path} holds streams of another model ({shown}): "
                "open it with the model that wrote them"
            )


def _repeated(rows: LiveStream, batch: int) -> LiveStream:
    """Repeats rows, on the host, until the batch is full."""
    full: LiveStream = jax.tree.map(lambda x: np.resize(np.asarray(x), (batch, *x.shape[1:])), rows)
    return full


def of_items(task: Task) -> Reasoning:
    """Returns the task if it can serve live streams.

    Args:
      task: any task. Streams must hold item ids; queries must be about items or kinds.

    Returns:
      The same task.

    Raises:
      ValueError: the task reads or asks something else.
    """
    if (
        not isinstance(task, Reasoning)
        or task.answers.questions.query == "words"
        or task.table is None
    ):
        raise ValueError(
            "live streams hold item ids and are asked about items or kinds: this model reads "
            "something else. Take a model of clicks (configs/xlong.py) or of configs/synthetic.py"
        )
    return task


def _plain(users: Sequence[User]) -> list[User]:
    """Checks users, and turns NumPy's scalars into Python's.

    Raises:
      ValueError: a user is neither str nor int of 64 bits.
    """
    if isinstance(users, str | bytes):
        raise ValueError(f"users={users!r} is one user: give a list, as [{users!r}]")
    plain = [user.item() if isinstance(user, np.generic) else user for user in users]
    for user in plain:
        _check_user(user)
    return plain


def _check_user(user: object) -> None:
    number = isinstance(user, int) and not isinstance(user, bool) and -(2**63) <= user < 2**63
    if not number and not isinstance(user, str):
        raise ValueError(
            f"user {user!r} is a {type(user).__name__}: a user is a str or an int of 64 bits"
        )


def _pairs(users: Sequence[User], lists: Sequence[Ids], name: str) -> list[tuple[User, Ids]]:
    """Pairs each user with a list of ids; raises ValueError if the two lengths differ."""
    plain = _plain(users)
    if len(plain) != len(lists):
        raise ValueError(
            f"{len(plain)} users, but {len(lists)} lists of {name}: give one list for each user"
        )
    return list(zip(plain, lists, strict=True))


def _listed(about: Any, path: str | Path) -> list[User]:
    """Returns the users that a file lists.

    Raises:
      ValueError: they are no list of different users; names the file and the place.
    """
    users = about.get("users")
    if not isinstance(users, list):
        raise ValueError(f"{path}: users is missing or is not a list: {_CURE}")
    known: set[User] = set()
    for place, user in enumerate(users):
        try:
            _check_user(user)
        except ValueError as error:
            raise ValueError(f"{path}: users[{place}]: {error}") from error
        if user in known:
            raise ValueError(f"{path}: users[{place}] is {user!r}, who is listed twice: {_CURE}")
        known.add(user)
    return users


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


@jax.jit
def _take(rows: LiveStream, slots: Array) -> LiveStream:
    """Rows of slots [b]; a slot beyond the last row gives the last row."""
    taken: LiveStream = jax.tree.map(lambda x: x.at[slots].get(mode="clip"), rows)
    return taken


@functools.partial(jax.jit, donate_argnums=0)
def _put(rows: LiveStream, slots: Array, new: LiveStream) -> LiveStream:
    """All rows, with `new` at slots [b]; slots beyond the last row are skipped."""
    changed: LiveStream = jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), rows, new)
    return changed


@jax.jit
def _or_blank(rows: LiveStream, taken: Array, blank: LiveStream) -> LiveStream:
    """Rows where `taken`, bool [b], is true; the empty stream elsewhere."""

    def row(x: Array, empty: Array) -> Array:
        return jnp.where(taken.reshape(-1, *[1] * (x.ndim - 1)), x, empty)

    chosen: LiveStream = jax.tree.map(row, rows, blank)
    return chosen


def _leaves(tree: Params) -> list[tuple[Any, Any]]:
    """(path, leaf) of every leaf."""
    return jax.tree_util.tree_leaves_with_path(tree)
