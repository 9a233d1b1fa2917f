"""Events on disk: prepared once from a user's table, sorted by user and time, and read in place.

The arrays are files that the operating system maps, so a hundred million events need little memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import logging

from rmjax.data.source import hash64
from rmjax.data.tables.files import ROWS, Part, arrow, files_of, parts_of
from rmjax.data.tables.rows import Columns, Report, digest, read, refuse_nothing
from rmjax.data.tables.values import Ids, is_text
from rmjax.io import atomic, paths
from rmjax.io.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

_USERS = "users.parquet"  # the ids of users, by number
VERSION = 2  # raise it when the files change
SORTED = 1 << 20  # events that are sorted at once, about
# Seconds since 1970 are in this range from 1973 to 2286, and milliseconds are above it.
_SECONDS = (10**8, 10**10)


@dataclasses.dataclass(frozen=True)
class Events:
    """Streams of events. A stream holds a user's events by time; or those of a user's session.

    Attributes:
      items: i32 [R], the item of each event, stream by stream.
      times: i64 or f64 [R].
      starts: i64 [S + 1], where streams begin in `items`; the last entry is R.
      users: i32 [S], the user of each stream, ascending.
      user_keys: i64 [users], a number that depends on the user's id alone.
      ids: the id of each item, sorted: all integers or all strings.
      place: the table's name in errors.
      counts: numbers for the log: 'rows', 'duplicates', and one for each reason of a skipped row.
    """

    items: np.ndarray
    times: np.ndarray
    starts: np.ndarray
    users: np.ndarray
    user_keys: np.ndarray
    ids: Sequence[int] | Sequence[str]
    place: str
    counts: dict[str, int]

    def report(self) -> None:
        """Logs what was read, what was left out, and why."""
        counts = dict(self.counts)
        rows, users = counts.pop("rows"), len(self.user_keys)
        left = "".join(f", {count:,} {reason}" for reason, count in counts.items() if count)
        sizes = f"{users:,} users, {len(self.ids):,} items, {len(self.items):,} events"
        logging.info(
            "Table: %s of %s rows%s.", sizes, f"{rows:,}", left and f"; left out:{left[1:]}"
        )


def prepare(events: Any, chosen: Columns, cache_dir: str, seed: int) -> Path:
    """Prepares the events of a table, unless they exist already.

    Items are numbered in the order of their ids. Events of equal times are ordered by
    hash(seed, user, item), so neither the order of the file nor the ids tell which one came first.
    An event with the user, item and time of another one is kept once.

    Args:
      events: as `parts_of` takes it.
      chosen: what is read.
      cache_dir: the folder for prepared data; '' means `paths.cache('')`.
      seed: seed of the order of equal times.

    Returns:
      The folder for `open_events`.

    Raises:
      ValueError: the table has no usable events, or `read` refuses it.
      FileNotFoundError: there is no such file.
      OSError: nothing can be written in `cache_dir`.
      Stopped: the run was asked to stop.
    """
    parts = list(parts_of(events))
    files = files_of(events) if isinstance(events, str | Path) else ()
    options = dataclasses.asdict(chosen) | {"seed": seed, "version": VERSION}
    if not files:
        options["content"] = digest(parts[0], chosen)
    cache = paths.cache(cache_dir) / "table"
    place = cache / atomic.digest(files, options)
    if not place.exists():
        logging.info("Preparing a table, once, from %s in %s", parts[0].place, place)
        begin = time.monotonic()
        with atomic.folder(cache) as scratch:
            made = scratch / "events"
            made.mkdir()
            _make(parts, chosen, seed, scratch, made)
            atomic.publish(made, place)
        logging.info("Prepared in %.1f seconds.", time.monotonic() - begin)
    return place


def open_events(folder: Path) -> Events:
    """Opens the folder that `prepare` returned.

    Args:
      folder: the prepared events.

    Returns:
      The events; their arrays are mapped, not read.

    Raises:
      FileNotFoundError: a file was removed; names it.
    """
    try:
        kept = json.loads((folder / "events.json").read_text())
        arrays = {
            name: np.memmap(folder / name, dtype, "r") for name, dtype in kept["arrays"].items()
        }
    except FileNotFoundError as error:
        cure = f"remove {folder}, and the next run prepares it again"
        raise FileNotFoundError(f"{error.filename} is gone: {cure}") from error
    return Events(**arrays, ids=kept["ids"], place=kept["place"], counts=kept["counts"])


def user_ids(folder: Path) -> pa.Array:
    """Reads the id of each user, in order of the numbers in `Events.users`.

    Args:
      folder: the prepared events.

    Returns:
      Integers or strings [users].
    """
    table = arrow().parquet.read_table(folder / _USERS)
    return table["user"].combine_chunks()


def _make(parts: list[Part], chosen: Columns, seed: int, scratch: Path, made: Path) -> None:
    """Fills the folder `made`; `scratch` holds the unsorted events meanwhile."""
    report, keys = Report(), [key for key in chosen.named() if key not in ("time", "event")]
    ids = {key: Ids() for key in keys}
    raw = {key: Growing(scratch / key, np.int32) for key in keys}
    time = Growing(scratch / "time", np.int64)
    progress = Progress(f"reading {parts[0].place}", unit="million rows")
    for rows in read(parts, chosen, report):
        progress.to(report.rows)
        for key in keys:
            numbers = ids[key].number(getattr(rows, key), chosen.named()[key], rows.place)
            raw[key].append(numbers)
        time.append(rows.time)
    progress.close()
    refuse_nothing(parts[0].place, chosen, report, time.size)
    times = time.array()
    _refuse_two_units(times, parts[0].place, chosen.time)
    ranks = {key: ids[key].sort(parts[0].typed) for key in keys}
    for key in keys:
        numbers, rank = raw[key].array(), ranks[key][1]
        for part in slices(len(numbers)):
            numbers[part] = rank[numbers[part]]
    unsorted = Unsorted(times=times, **{key: raw[key].array() for key in keys})
    id_keys = {key: _keys(ranks[key][0]) for key in ("user", "item")}
    arrays = _sort(unsorted, id_keys["user"], id_keys["item"], seed, made)
    arrays["user_keys"] = Growing(made / "user_keys", np.int64).append(id_keys["user"])
    counts = {"rows": report.rows, **report.left_out(chosen)}
    counts["duplicates"] = time.size - arrays["items"].size
    kept = {
        "arrays": {name: array.dtype.str for name, array in arrays.items()},
        "place": parts[0].place,
        "counts": counts,
        "ids": ranks["item"][0].to_pylist(),
    }
    for array in arrays.values():
        array.close()
    pa = arrow()
    pa.parquet.write_table(pa.table({"user": ranks["user"][0]}), made / _USERS)
    (made / "events.json").write_text(json.dumps(kept))


class Growing:
    """An array on disk that grows at its end.

    Args:
      path: of its file.
      dtype: of the array. Integers become f64 when floats are appended.
    """

    def __init__(self, path: Path, dtype: Any):
        self.path, self.dtype, self.size = path, np.dtype(dtype), 0
        self._file = path.open("wb")

    def append(self, values: np.ndarray) -> Growing:
        """Appends a part; returns the array."""
        if values.dtype.kind == "f" and self.dtype.kind == "i":
            before = self.array()
            self.dtype = np.dtype(np.float64)
            for part in slices(len(before)):
                before.view(np.float64)[part] = before[part]
        values.astype(self.dtype, copy=False).tofile(self._file)
        self.size += len(values)
        return self

    def array(self) -> np.ndarray:
        """The array so far. It is mapped, and may be changed in place."""
        self._file.flush()
        return np.memmap(self.path, self.dtype, "r+") if self.size else np.empty(0, self.dtype)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Unsorted(NamedTuple):
    """Events in the order of the table: places of their ids among the sorted ids, and times."""

    times: np.ndarray
    user: np.ndarray
    item: np.ndarray
    session: np.ndarray | None = None


def _sort(
    events: Unsorted, user_keys: np.ndarray, item_keys: np.ndarray, seed: int, made: Path
) -> dict[str, Growing]:
    """Writes the events by user, session, time and hash, a few million at a time.

    Returns:
      {field of `Events`: its array}.
    """
    arrays = {
        "items": Growing(made / "items", np.int32),
        "times": Growing(made / "times", events.times.dtype),
        "starts": Growing(made / "starts", np.int64),
        "users": Growing(made / "users", np.int32),
    }
    total, counts = len(events.user), np.zeros(len(user_keys), np.int64)
    for part in slices(total):
        counts += np.bincount(events.user[part], minlength=len(counts))
    cuts = np.searchsorted(np.cumsum(counts), np.arange(0, total, SORTED), "right")
    progress = Progress("sorting events", total, "million rows")
    for low, high in itertools.pairwise(np.unique([*cuts, len(counts)])):
        rows = np.flatnonzero((events.user >= low) & (events.user < high))
        user, item, time = events.user[rows], events.item[rows], events.times[rows]
        session = np.zeros_like(user) if events.session is None else events.session[rows]
        order = np.lexsort((time, user) if events.session is None else (time, session, user))
        user, item, time, session = (x[order] for x in (user, item, time, session))
        equal = _repeats(user, session, time)
        tied = np.flatnonzero(equal | np.append(equal[1:], False))
        tie = hash64("table tie", seed, user_keys[user[tied]], item_keys[item[tied]])
        item[tied] = item[tied][np.lexsort((item[tied], tie, np.cumsum(~equal)[tied]))]
        again = equal & _repeats(item)
        user, item, time, session = (x[~again] for x in (user, item, time, session))
        begins = ~_repeats(user, session)
        arrays["starts"].append(arrays["items"].size + np.flatnonzero(begins))
        arrays["users"].append(user[begins])
        arrays["items"].append(item)
        arrays["times"].append(time)
        progress.step(len(rows))
    progress.close()
    arrays["starts"].append(np.array([arrays["items"].size]))
    return arrays


def _repeats(*columns: np.ndarray) -> np.ndarray:
    """Whether each row equals the row before it, bool [n]."""
    return np.append(False, np.all([x[1:] == x[:-1] for x in columns], axis=0))


def _refuse_two_units(times: np.ndarray, place: str, name: str) -> None:
    """Refuses times of which some are seconds and others milliseconds, or smaller units."""
    low, high = times.min(), times.max()
    if _SECONDS[0] <= low < _SECONDS[1] and high >= 10 * _SECONDS[1]:
        shown = f"{low} and {high}"
        cause = f"column {name}: times from {shown} mix seconds with milliseconds"
        raise ValueError(f"{place}, {cause}: bring them to one unit")


def _keys(ids: pa.Array) -> np.ndarray:
    """A number for each id, i64, which does not depend on the other ids."""
    if not is_text(ids.type):
        return ids.to_numpy()
    blocks = (ids[part].to_pylist() for part in slices(len(ids)))
    names = itertools.chain.from_iterable(blocks)
    return np.fromiter((zlib.crc32(name.encode()) for name in names), np.int64, len(ids))


def slices(count: int) -> Iterator[slice]:
    """Slices of a million entries."""
    return (slice(k, min(k + ROWS, count)) for k in range(0, count, ROWS))
