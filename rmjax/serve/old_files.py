"""Copies streams from folders of earlier versions into a database.

    python -m rmjax.import_streams --workdir=runs/xlong --folder=old --store=streams.lmdb

Such a folder has `index.json`, which names the users and their slots, and one file of rows for each
array of a stream. It is only read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from rmjax import command_line
from rmjax.io import paths
from rmjax.io.text import read_json
from rmjax.machines.live import LiveStream, open_stream
from rmjax.run import environment
from rmjax.run.workdir import lock
from rmjax.serve.checks import check_rows, listed_users, of_items
from rmjax.serve.database import Database, Row, User, compare
from rmjax.serve.lmdb_file import CURE
from rmjax.serve.model import open_model
from rmjax.serve.rows import Packing, about, named, stream_lengths
from rmjax.types import Params, Task, at

_CHUNK = 4096  # rows of a transaction


def import_streams(task: Task, params: Params, folder: str | Path, store: str | Path) -> int:
    """Copies all streams of a folder into a new database.

    Args:
      task: of the model that wrote them.
      params: of the same model.
      folder: the folder.
      store: path of the database; it must not have streams yet.

    Returns:
      Number of streams.

    Raises:
      FileNotFoundError: the folder has no index.
      ValueError: the folder is damaged or another model's; names the file and the field. Or the
        database has streams already.
      RuntimeError: another process has the folder or the database open.
      OSError: the database cannot be written.
    """
    task, source = of_items(task), paths.resolve(folder, "folder")
    assert task.table is not None
    length, items = task.segment_length, len(at(params, task.table))
    blank = open_stream(task.machine, params["machine"], 1, length)
    packing, wanted = Packing(blank), about(blank, params["machine"], length)
    with lock(source, reading=True, name="folder"):
        users, slots, capacity = _read_index(source / "index.json", wanted)
        files = _open_files(source, blank, capacity)
        written = (source / "index.json").stat().st_mtime
        for some, rows in _parts(users, slots, files):
            check_rows(rows, some, {"tail": items, "tail_len": length}, str(source))
        target = Database(store, wanted)
        try:
            if len(target):
                raise ValueError(f"{target.path} has {len(target)} streams: name a new database")
            for some, rows in _parts(users, slots, files):
                stamps = zip(some, stream_lengths(rows), packing.pack(rows, len(some)), strict=True)
                target.commit({user: Row(1, int(n), written, row) for user, n, row in stamps})
        finally:
            target.close()
    return len(users)


def _parts(
    users: list[User], slots: list[int], files: LiveStream
) -> Iterator[tuple[list[User], LiveStream]]:
    """Yields users and their rows [n, ...]."""
    for first in range(0, len(users), _CHUNK):
        part = slice(first, first + _CHUNK)
        yield users[part], jax.tree.map(lambda x, rows=slots[part]: np.asarray(x[rows]), files)


def _open_files(folder: Path, blank: LiveStream, capacity: int) -> LiveStream:
    """The rows of a folder [capacity, ...], mapped into memory."""
    files = []
    for name, x in named(blank, "."):
        path, shape = folder / f"{name}.bin", (capacity, *x.shape[1:])
        size = x.dtype.itemsize * int(np.prod(shape))
        actual = path.stat().st_size if path.exists() else 0
        if actual < size:
            raise ValueError(f"{path} has {actual} of {size} bytes: {CURE}")
        files.append(np.memmap(path, x.dtype, "r", shape=shape))
    rows: LiveStream = jax.tree.unflatten(jax.tree.structure(blank), files)
    return rows


def _read_index(path: Path, wanted: dict[str, Any]) -> tuple[list[User], list[int], int]:
    """Reads an index and checks every field; returns users, their slots and the number of slots."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name a folder of streams")
    index = read_json(path)
    if not isinstance(index, dict):
        raise ValueError(f"{path} is not an index of streams: {CURE}")
    digest = index.pop("sha256", None)  # the first indexes have none
    content = json.dumps(index, sort_keys=True).encode()
    if digest is not None and digest != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{path}: the digest does not fit the content: {CURE}")
    compare(index, {name: wanted[name] for name in ("segment_length", "machine")}, path)
    users, slots, capacity = listed_users(index, path), index.get("slots"), index.get("capacity")
    if type(capacity) is not int or capacity < 1:
        raise ValueError(
            f"{path}: capacity is {capacity!r}: it must be a whole number, at least 1. {CURE}"
        )
    if not isinstance(slots, list) or len(slots) != len(users):
        count = len(slots) if isinstance(slots, list) else "no"
        raise ValueError(f"{path}: {len(users)} users, but {count} slots: {CURE}")
    taken: set[int] = set()
    for place, slot in enumerate(slots):
        if type(slot) is not int or not 0 <= slot < capacity or slot in taken:
            rule = f"slots are different whole numbers in 0 .. {capacity - 1}"
            raise ValueError(f"{path}: slots[{place}] is {slot!r}, but {rule}: {CURE}")
        taken.add(slot)
    return users, slots, capacity


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    asked = flags.FLAGS
    try:
        if not (asked.workdir and asked.folder and asked.store):
            raise ValueError("give --workdir of the model, --folder to read, --store to make")
        logging.info("%s", environment.prepare())
        model = open_model(asked.workdir)
        count = import_streams(model.task, model.params, asked.folder, asked.store)
        logging.info("%s: %d streams were copied.", asked.store, count)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", "", "Workdir of the model that wrote the streams.")
    flags.DEFINE_string("folder", "", "Folder of streams of an earlier version; it is only read.")
    flags.DEFINE_string("store", "", "Path of the database to make, such as streams.lmdb.")


def cli() -> None:
    """Runs the command `python -m rmjax.import_streams`."""
    command_line.run(main, define_flags)
