"""Live memories of many users: each one's stream goes on with every item, and is asked at any time.

    streams = Streams(task, params)
    streams.write(["ann", "bob"], [[3, 14, 15], [9]])  # any number of items of each
    streams.answer(["ann"], [[26, 5]])  # -> [f32 [2]], the scores of two items

Requests of many users and lengths are brought into a few shapes, each compiled once. What a stream answers is what
evaluation answers after the same items, however they came.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
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

Ids = Sequence[int] | np.ndarray
User = str | int  # an int of 64 bits
_INDEX = "index.json"
_CURE = "bring it back from a copy, or load what was saved into another folder"
P = ParamSpec("P")
T = TypeVar("T")


def _one_at_a_time(
    method: Callable[Concatenate[Streams, P], T],
) -> Callable[Concatenate[Streams, P], T]:
    """A method of an open store, in the process that opened it. Threads wait for each other."""

    @functools.wraps(method)
    def call(self: Streams, *args: P.args, **kwargs: P.kwargs) -> T:
        self._refuse_forked()
        with self._lock:
            if self._closed:
                raise RuntimeError("these streams are closed: open them again with Streams(...)")
            return method(self, *args, **kwargs)

    return call


class OnDevice:
    """Rows of streams as arrays on the device."""

    def __init__(self, blank: LiveStream, capacity: int):
        self.rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), blank)

    def take(self, slots: np.ndarray) -> LiveStream:
        return _take(self.rows, slots)

    def put(self, slots: np.ndarray, rows: LiveStream) -> None:
        """Slots beyond the last one are none."""
        self.rows = _put(self.rows, slots, rows)

    def wait(self) -> None:
        jax.block_until_ready(self.rows)

    def grow(self, capacity: int) -> None:
        more = lambda x: jnp.concatenate([x, jnp.zeros((capacity - len(x), *x.shape[1:]), x.dtype)])
        self.rows = jax.tree.map(more, self.rows)


class InFiles:
    """Rows of streams as one file an array, mapped into memory: for more users than a device holds."""

    def __init__(self, blank: LiveStream, capacity: int, folder: Path, expected: int = 0):
        """expected: rows that must be there already; raises ValueError naming the file that is short of them."""
        self._folder = (
            folder  # on the disk are the rows as the last `flush` left them, or later ones
        )
        self._blank = {
            jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in _leaves(blank)
        }
        self._structure = jax.tree.structure(blank)
        self._sizes = {
            name: x.dtype.itemsize * int(np.prod(x.shape[1:])) for name, x in self._blank.items()
        }
        for name, size in self._sizes.items():
            actual = self._path(name).stat().st_size if self._path(name).exists() else 0
            if actual < expected * size:
                raise ValueError(
                    f"{self._path(name)} has {actual} of {expected * size} bytes: {_CURE}"
                )
        self.grow(capacity)

    def take(self, slots: np.ndarray) -> LiveStream:
        places = np.minimum(slots, self._capacity - 1)
        return jax.tree.unflatten(self._structure, [file[places] for file in self._files])

    def put(self, slots: np.ndarray, rows: LiveStream) -> None:
        there = slots < self._capacity
        for file, new in zip(self._files, jax.tree.leaves(rows), strict=True):
            file[slots[there]] = np.asarray(new)[there]

    def wait(self) -> None:
        """`put` has already waited for what it puts."""

    def grow(self, capacity: int) -> None:
        for name, size in self._sizes.items():
            try:
                with self._path(name).open("ab") as file:
                    # The disk gives the room at once: without room later, a write would kill us.
                    os.posix_fallocate(file.fileno(), 0, capacity * size)
                    os.fsync(file.fileno())
            except OSError as error:
                need = f"{capacity} streams need {capacity * sum(self._sizes.values()):,} bytes in {self._folder}"
                raise OSError(
                    f"{need} ({error.strerror}): free space, or give another folder"
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
        """Returns when the rows would outlast a power failure."""
        for name, file in zip(self._blank, self._files, strict=True):
            try:
                file.flush()
            except OSError as error:
                raise atomic.explained(error, self._path(name), file.nbytes) from error


class Streams:
    """A store of live streams, one a user, of one trained model.

    Any number of threads may call it; one call runs at a time. A process that was forked from the
    one that opened the store, and everybody after `close`, is refused.

    Args:
      task, params: of an opened `Model`, or as `train.trained` gives them; the streams are of item ids.
      capacity: users there is room for; doubles when more come, which compiles everything anew.
      batches, segments, queries: the shapes that requests are padded to: users, segments that a write may fill, queries
        of a user. Longer writes go in parts.
      folder: where the rows lie in files; None: on the device. A folder with streams of the same model is opened, as
        `flush` left it; one store at a time has it, until `close`.

    Raises:
      ValueError: the task's streams are not of item ids, or the folder's are of another model.
        Or the folder's index is damaged: the error names the field.
      RuntimeError: another store has the folder.
      OSError: there is no room for the rows; the error says how much they need.
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
        self._asked = task.answers.questions.kinds or self._num_items
        self._params, self._length = jax.device_put(params), task.segment_length
        self._batches, self._segments, self._queries = (
            sorted(batches),
            sorted(segments),
            sorted(queries),
        )
        machine = task.machine
        self._blank = open_stream(machine, params["machine"], 1, self._length)
        self._slots: dict[User, int] = {}
        self._free: list[int] = []
        self._released: list[int] = []  # of streams in files: free once `flush` has said so
        self._used = 0  # slots that were ever given to somebody
        self._lock, self._process, self._closed = threading.RLock(), os.getpid(), False
        self._capacity, self._folder = (
            capacity,
            None if folder is None else resolve(folder, "folder"),
        )
        self._store: Any
        with contextlib.ExitStack() as held:
            if self._folder is None:
                self._store = OnDevice(self._blank, capacity)
            else:
                held.enter_context(lock(self._folder))
                index = self._read_index()
                self._slots = dict(zip(index["users"], index["slots"], strict=True))
                self._capacity = max(capacity, index["capacity"])
                self._used = max(index["slots"], default=-1) + 1
                # First the files, whose sizes bound the numbers of the index.
                self._store = InFiles(self._blank, self._capacity, self._folder, index["capacity"])
                self._free = sorted(set(range(self._used)) - set(index["slots"]))
                self._fill(index["erase"], self._blank)
            self._held = held.pop_all()

        @jax.jit
        def feed_rows(params: Params, rows: LiveStream, items: Array, mask: Array) -> LiveStream:
            return feed(machine, params["machine"], rows, items, mask)

        @jax.jit
        def answer_rows(params: Params, rows: LiveStream, query: Array, mask: Array) -> Array:
            return task.answer(
                params, current_memory(machine, params["machine"], rows), query, mask
            )

        self._feed: Callable = functools.partial(feed_rows, self._params)
        self._answer: Callable = functools.partial(answer_rows, self._params)

    @_one_at_a_time
    def __len__(self) -> int:
        return len(self._slots)

    @_one_at_a_time
    def __contains__(self, user: object) -> bool:
        return user in self._slots

    @_one_at_a_time
    def write(self, users: Sequence[User], items: Sequence[Ids]) -> None:
        """Appends items to the users' streams, in order; a user may come twice, and one who is new gets a stream.

        Raises:
          ValueError: a user is neither str nor int, or an item is none of the model's, or the lists
            differ in length; names the user and the item. Nothing is written then.
        """
        parts: dict[User, list[np.ndarray]] = {}
        for user, more in _pairs(users, items, "items"):
            parts.setdefault(user, []).append(self._checked(user, more, self._num_items, "item"))
        left = {user: np.concatenate(each) for user, each in parts.items() if sum(map(len, each))}
        self._open([user for user in parts if user not in self._slots])
        longest = self._segments[-1] * self._length
        while left:
            for shape, group in self._grouped(
                {user: ids[:longest] for user, ids in left.items()}, self._fills
            ):
                slots, ids, mask = self._padded(group, shape * self._length, self._slots)
                self._store.put(slots, self._feed(self._store.take(slots), ids, mask))
            left = {user: ids[longest:] for user, ids in left.items() if len(ids) > longest}

    @_one_at_a_time
    def answer(self, users: Sequence[User], queries: Sequence[Ids]) -> list[np.ndarray]:
        """-> of each user's queries the scores f32 [Q], or the logits of every class [Q, C], from all that was written
        so far. One who has no stream is answered from an empty one.
        """
        pairs = _pairs(users, queries, "queries")
        asked = [self._checked(*pair, self._asked, "query") for pair in pairs]
        places = {
            place: self._slots.get(user, self._capacity) for place, (user, _) in enumerate(pairs)
        }
        scores: list[list[np.ndarray]] = [[] for _ in asked]
        longest = self._queries[-1]
        for first in range(0, max(map(len, asked), default=0), longest):
            now = {
                k: query[first : first + longest]
                for k, query in enumerate(asked)
                if len(query) > first
            }
            for shape, group in self._grouped(now, self._asks):
                slots, query, mask = self._padded(group, shape, places)
                found = np.asarray(self._answer(self._opened(slots), query, mask))
                for row, (place, part) in enumerate(group.items()):
                    scores[place].append(found[row, : len(part)])
        return [np.concatenate(each) if each else np.zeros(0, np.float32) for each in scores]

    @_one_at_a_time
    def wait(self) -> None:
        """Returns when what was written is there; answers wait by themselves."""
        self._store.wait()

    @_one_at_a_time
    def reset(self, users: Sequence[User]) -> None:
        """Forgets users; what is written for one of them from then on begins a new stream.

        The bytes of their memories are overwritten: on the device at once; in files by the next
        `flush`, since until then a crash brings the users back.
        """
        known = list(dict.fromkeys(map(self._known, _plain(users))))
        self._release([self._slots.pop(user) for user in known])

    @_one_at_a_time
    def fork(self, user: User, copies: Sequence[User]) -> None:
        """Makes the streams of `copies`, which are new users, what that of `user` is now."""
        (user,), copies = _plain([user]), list(dict.fromkeys(_plain(copies)))
        source = self._slots[self._known(user)]
        taken = [copy for copy in copies if copy in self._slots]
        if taken:
            raise ValueError(f"user {taken[0]!r} has a stream already: reset it first")
        self._open(copies, self._store.take(np.array([source])))

    @_one_at_a_time
    def save(self, path: str | Path) -> None:
        """Writes all streams as the directory `path`, whole or not at all, every file under a
        digest. All rows are copied to the host's memory for it.

        Raises:
          ValueError: the path is an address or has a character that checkpoints cannot have; or a
            memory is not finite.
          FileExistsError: something is there that `save` did not write; what it did write is
            replaced.
          OSError: it could not be written; names the folder, how much it needs, and what to do.
        """
        users, slots = (
            list(self._slots),
            np.fromiter(self._slots.values(), np.int64, len(self._slots)),
        )
        parts = [jax.tree.map(np.asarray, self._store.take(part)) for part in _cut(slots, 4096)]
        rows = jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else {}
        self._check_rows(rows, users, "cannot be saved")
        checkpoint.save_tree(path, rows, {"streams": self._about | {"users": users}})

    @_one_at_a_time
    def load(self, path: str | Path) -> None:
        """Takes the streams that `save` wrote in the place of those that the store has.

        Everything is checked and written before the first user goes, so a load that fails changes
        nothing. There must be room for both; `reset` makes some.

        Raises:
          FileNotFoundError: nothing is there.
          ValueError: they are damaged, or memories of another model; names the file, or the user
            and the leaf.
          OSError: there is no room for them.
        """
        users: list[User] = []

        def like(manifest: dict[str, Any]) -> Any:
            about = manifest.get("streams")
            self._check(about, path)
            users.extend(_listed(about, path))
            many = len(users)
            return (
                jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct((many, *x.shape[1:]), x.dtype), self._blank
                )
                if many
                else {}
            )

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
        """Of streams in a folder: brings it to what the store has, so that a power failure takes
        nothing of it.

        A folder that was not flushed, as after a crash, has the users of the last time; the memory
        of one who was written to since may be that of then, of the crash, or torn where the write
        was under way: `save` is what lasts.

        Raises:
          ValueError: the streams are on the device.
          OSError: a file could not be written; names it, its size and what to do. Another `flush`
            may follow.
        """
        if self._folder is None:
            raise ValueError("these streams are on the device: save(path) writes them")
        self._store.flush()
        index = {
            "users": list(self._slots),
            "slots": list(self._slots.values()),
            "capacity": self._capacity,
        }
        index |= self._about | {"erase": self._released}
        atomic.write(self._folder / _INDEX, json.dumps(index | {"sha256": _digest(index)}))
        self._fill(
            self._released, self._blank
        )  # an earlier crash is made good when the folder is opened
        self._free, self._released = self._free + self._released, []

    def close(self) -> None:
        """Of streams in a folder: flushes, and lets another store have it, even where `flush`
        fails. Afterwards every call but `close` is refused.
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
        """Compiles every shape now, rather than when a request first has it."""
        for batch in self._batches:
            nobody = np.full(batch, self._capacity)
            self._store.put(nobody, _repeated(self._blank, batch))  # as new users are
            for segments in self._segments:
                ids = np.zeros((batch, segments * self._length), np.int32)
                self._store.put(nobody, self._feed(self._store.take(nobody), ids, ids > 0))
            for queries in self._queries:
                ids = np.zeros((batch, queries), np.int32)
                jax.block_until_ready(self._answer(self._opened(nobody), ids, ids > 0))

    # What requests have in common.

    def _checked(self, user: User, ids: Ids, below: int, name: str) -> np.ndarray:
        names = {"item": "items", "query": "queries"}[name]
        try:
            array = np.asarray(ids)
        except ValueError as error:  # lists of other lengths
            raise ValueError(
                f"user {user!r}: {names} must be one flat list of whole numbers"
            ) from error
        if array.ndim > 1:
            raise ValueError(
                f"user {user!r}: {names} must be one flat list, got shape {array.shape}"
            )
        array = array.reshape(-1)
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(
                f"user {user!r}: each {name} must be a whole number, got {array.dtype}"
            )
        wrong = array[(array < 0) | (array >= below)]
        if wrong.size:
            raise ValueError(
                f"user {user!r}: {name} {wrong[0]} is none of the model's 0 .. {below - 1}"
            )
        return array.astype(np.int32)

    def _known(self, user: User) -> User:
        if user not in self._slots:
            raise ValueError(f"user {user!r} has no stream here")
        return user

    def _fills(self, ids: np.ndarray) -> int:
        """Segments that are enough for items: the tail's are there besides."""
        return next(n for n in self._segments if len(ids) <= n * self._length)

    def _asks(self, query: np.ndarray) -> int:
        return next(n for n in self._queries if len(query) <= n)

    def _grouped(self, requests: dict, shape_of: Callable) -> Iterator[tuple[int, dict]]:
        """(shape, requests that have it), at most the largest batch at a time."""
        by_shape: dict[int, list] = {}
        for key, request in requests.items():
            by_shape.setdefault(shape_of(request), []).append((key, request))
        for shape, each in sorted(by_shape.items()):
            for part in _cut(each, self._batches[-1]):
                yield shape, dict(part)

    def _padded(
        self, group: dict, width: int, slots: dict
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> slots [b], ids [b, width], mask [b, width]; b is the smallest batch that holds the group."""
        batch = next(b for b in self._batches if len(group) <= b)
        place, ids = np.full(batch, self._capacity), np.zeros((batch, width), np.int32)
        mask = np.zeros((batch, width), bool)
        for row, (key, part) in enumerate(group.items()):
            place[row], ids[row, : len(part)], mask[row, : len(part)] = slots[key], part, True
        return place, ids, mask

    def _opened(self, slots: np.ndarray) -> LiveStream:
        """Rows to be asked; slot == capacity is the empty stream."""
        return _or_blank(self._store.take(slots), slots < self._capacity, self._blank)

    def _open(self, users: Sequence[User], rows: LiveStream | None = None) -> None:
        """Gives new users slots, with those rows (one for all of them, or one each; None: empty
        streams).

        Where that fails nobody is new, and no slot of another has changed.
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
        """Puts rows into slots: one for all of them, or one each."""
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
        if os.getpid() != self._process:  # its lock may be held, and JAX does not work after a fork
            raise RuntimeError(
                f"process {self._process} opened these streams, and this process was forked from it: open other "
                "streams in it, and start it with multiprocessing's 'spawn'"
            )

    def _read_index(self) -> dict[str, Any]:
        """What `flush` wrote last, every field checked; that of nobody where it never did."""
        assert self._folder is not None
        path = self._folder / _INDEX
        if not path.exists():
            return {"users": [], "slots": [], "capacity": 0, "erase": []}
        index = read_json(path)
        if not isinstance(index, dict):
            raise ValueError(f"{path}: this is no index of streams: {_CURE}")
        digest = index.pop("sha256", None)  # indexes of earlier versions have none
        if digest is not None and digest != _digest(index):
            raise ValueError(f"{path}: its digest is not that of its content: {_CURE}")
        self._check(index, path)
        users, slots, capacity = _listed(index, path), index.get("slots"), index.get("capacity")
        if type(capacity) is not int or capacity < 1:
            raise ValueError(
                f"{path}: capacity is {capacity!r}: it must be a whole number from 1 on. {_CURE}"
            )
        if not isinstance(slots, list) or len(slots) != len(users):
            many = len(slots) if isinstance(slots, list) else "no"
            raise ValueError(f"{path}: {len(users)} users, but {many} slots: {_CURE}")
        taken: set[int] = set()
        for name, listed in (("slots", slots), ("erase", index.setdefault("erase", []))):
            for place, slot in enumerate(listed):
                if type(slot) is not int or not 0 <= slot < capacity or slot in taken:
                    text = f"{name}[{place}] is {slot!r}, which is not one of its own among 0 .. {capacity - 1}"
                    raise ValueError(f"{path}: {text}: {_CURE}")
                taken.add(slot)
        return index

    def _check_rows(self, rows: Any, users: Sequence[User], what: str) -> None:
        """Raises ValueError where a row cannot be a stream's, naming the user and the leaf."""
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
        """What memories are worth nothing without."""
        digest = hashlib.sha256()
        for _, leaf in _leaves(self._params["machine"]):
            digest.update(np.asarray(leaf).tobytes())
        return {"segment_length": self._length, "machine": digest.hexdigest()[:16]}

    def _check(self, about: Any, path: str | Path) -> None:
        if not isinstance(about, dict):
            raise ValueError(f"{path} holds no streams")
        wanted = self._about
        other = [name for name, value in wanted.items() if about.get(name) != value]
        if other:
            shown = "; ".join(
                f"{name} {about.get(name)!r}, here {wanted[name]!r}" for name in other
            )
            raise ValueError(
                f"{path} holds streams of another model ({shown}): open it with the one that wrote them"
            )


def _repeated(rows: LiveStream, batch: int) -> LiveStream:
    """On the host, one after the other, until there are so many."""
    return jax.tree.map(lambda x: np.resize(np.asarray(x), (batch, *x.shape[1:])), rows)


def of_items(task: Task) -> Reasoning:
    """The task, if its streams are of item ids and it is asked about items or kinds; ValueError if they are not."""
    if (
        not isinstance(task, Reasoning)
        or task.answers.questions.query == "words"
        or task.table is None
    ):
        what = "live streams are of item ids, asked about items or kinds: this model reads something else"
        raise ValueError(f"{what}. Take one of clicks (configs/xlong.py) or of synthetic.py")
    return task


def _plain(users: Sequence[User]) -> list[User]:
    """The users, NumPy's numbers as Python's. Raises ValueError where one is neither str nor
    int.
    """
    if isinstance(users, str | bytes):
        raise ValueError(f"users={users!r} is one user: give a list, as [{users!r}]")
    plain = [user.item() if isinstance(user, np.generic) else user for user in users]
    for user in plain:
        _check_user(user)
    return plain


def _check_user(user: Any) -> None:
    number = isinstance(user, int) and not isinstance(user, bool) and -(2**63) <= user < 2**63
    if not number and not isinstance(user, str):
        raise ValueError(
            f"user {user!r} is a {type(user).__name__}: a user is a str or an int of 64 bits"
        )


def _pairs(users: Sequence[User], lists: Sequence[Ids], name: str) -> list[tuple[User, Ids]]:
    plain = _plain(users)
    if len(plain) != len(lists):
        raise ValueError(
            f"{len(plain)} users, but {len(lists)} lists of {name}: give one list for each user"
        )
    return list(zip(plain, lists, strict=True))


def _listed(about: Any, path: str | Path) -> list[User]:
    """The users that a file lists. Raises ValueError where they cannot be; names the file and the
    place.
    """
    users = about.get("users")
    if not isinstance(users, list):
        raise ValueError(f"{path}: users is missing, or no list: {_CURE}")
    known: set[User] = set()
    for place, user in enumerate(users):
        try:
            _check_user(user)
        except ValueError as error:
            raise ValueError(f"{path}: users[{place}]: {error}") from error
        if user in known:
            raise ValueError(f"{path}: users[{place}] is {user!r}, who is there twice: {_CURE}")
        known.add(user)
    return users


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


@jax.jit
def _take(rows: LiveStream, slots: Array) -> LiveStream:
    return jax.tree.map(lambda x: x.at[slots].get(mode="clip"), rows)


@functools.partial(jax.jit, donate_argnums=0)
def _put(rows: LiveStream, slots: Array, new: LiveStream) -> LiveStream:
    return jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), rows, new)


@jax.jit
def _or_blank(rows: LiveStream, there: Array, blank: LiveStream) -> LiveStream:
    def row(x: Array, empty: Array) -> Array:
        return jnp.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, empty)

    return jax.tree.map(row, rows, blank)


def _leaves(tree: Any) -> list:
    return jax.tree_util.tree_leaves_with_path(tree)


def _cut(things: Any, size: int) -> Iterator[Any]:
    for first in range(0, len(things), size):
        yield things[first : first + size]
