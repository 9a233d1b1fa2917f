"""Recommends items to every user of a table of events, or writes their events into a store.

    python -m rmjax.recommend --workdir=runs/shop --events=events.parquet --out=recs.parquet --k=10
    python -m rmjax.recommend --workdir=runs/shop --events=events.parquet --store=streams.lmdb

The columns, the kinds of events and the rule for broken rows are those of the run
(`config.data.table`), unless a flag names others. With a column of sessions, a user's latest
session is read: the one that ends last.

--out: the file has the columns user, rank (1 is the best), item and score. It is written completely
or not at all.

--store: `python -m rmjax.serve` with the same store then knows every user. Users are called as in
the log: integers there are integers in the store. After a kill run the same line again. It leaves
out the users whose stream is written, and writes the others. A user with another stream is an
error, and nothing is written. So fill a store before a service writes to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from rmjax import command_line
from rmjax.data.tables.files import arrow
from rmjax.data.tables.rows import Columns
from rmjax.io import paths, terminal
from rmjax.io.progress import Progress, Stopped
from rmjax.run import environment
from rmjax.run.workdir import EXIT_PREEMPTED
from rmjax.serve import fill
from rmjax.serve.abilities import require
from rmjax.serve.histories import Histories
from rmjax.serve.model import Model, open_model

if TYPE_CHECKING:
    import pyarrow as pa

_USERS = 1 << 16  # users whose recommendations are in memory at once
_COLUMNS = {  # field of `Columns`: flag
    field.name: "kinds" if field.name == "events" else field.name
    for field in dataclasses.fields(Columns)
}


def recommend_all(
    model: Model,
    events: Any,
    out: str | Path,
    k: int = 10,
    exclude_seen: bool | None = None,
    latest: int = 0,
    columns: Mapping[str, str] | None = None,
) -> int:
    """Writes the best items of every user.

    Args:
      model: ranks items.
      events: a file, a folder of files, or a data frame, as `rmjax.open_table` takes it.
      out: the file to write, .parquet or .csv; an earlier one is replaced.
      k: items of each user; fewer where fewer are left.
      exclude_seen: whether all items that a user has are left out, also those of other sessions
        and those before the latest events. None: as in the evaluation of the model.
      latest: how many of a user's events are read, the latest ones; 0: all.
      columns: fields of `data.tables.rows.Columns`; the others are those of the run.

    Returns:
      The number of users.

    Raises:
      ValueError: the model does not rank items; the table has wrong columns or rows; none of the
        items is known to the model; `out` has another ending.
      FileNotFoundError: there are no such events, or the folder of `out` does not exist.
      OSError: the file cannot be written.
      Stopped: the process was asked to stop.
    """
    require(model, "recommend")
    target = _target(out)
    return _recommend(model, Histories(model, events, latest, columns), target, k, exclude_seen)


def _recommend(
    model: Model, histories: Histories, target: Path, k: int, exclude_seen: bool | None
) -> int:
    """`recommend_all` for histories that are open."""
    ranked, names = model.recommender, arrow().array(model.names.ids.tolist())
    progress = Progress("recommending", len(histories), unit="users", size=1)

    def parts() -> Iterator[pa.Table]:
        for first in range(0, len(histories), _USERS):
            part = slice(first, min(first + _USERS, len(histories)))
            read, seen = histories.read(part), histories.seen(part)
            best = ranked.best(read, k, exclude_seen, progress.step, seen)
            exists = best.items >= 0
            row, rank = np.nonzero(exists)
            yield arrow().table(
                {
                    "user": histories.users.take(arrow().array(first + row)),
                    "rank": arrow().array(rank + 1, arrow().int32()),
                    "item": names.take(arrow().array(best.items[exists])),
                    "score": arrow().array(best.scores[exists]),
                }
            )

    _write(parts(), target)
    progress.close()
    return len(histories)


def _target(out: str | Path) -> Path:
    """The file to write; a wrong ending or a missing folder is an error."""
    target = paths.resolve(str(out), "out")
    if target.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{target}: the name must end in .parquet or .csv")
    if not target.parent.is_dir():
        cure = "make this folder, or name another file with --out"
        raise FileNotFoundError(f"{target.parent} does not exist: {cure}")
    return target


def _write(parts: Iterator[pa.Table], target: Path) -> None:
    """Writes tables to one file, completely or not at all."""
    pa = arrow()
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    make = pa.parquet.ParquetWriter if target.suffix == ".parquet" else pa.csv.CSVWriter
    try:
        first = next(parts)
        with make(temporary, first.schema) as writer:
            writer.write_table(first)
            for part in parts:
                writer.write_table(part)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    terminal.plain_logs()
    asked = flags.FLAGS
    try:
        _check_flags(asked)
        logging.info("%s", environment.prepare())
        environment.find_devices()
        target = _target(asked.out) if asked.out else None
        given = {name: asked[flag].value for name, flag in _COLUMNS.items()}
        columns = {name: value for name, value in given.items() if value is not None}
        model = open_model(asked.workdir)
        if target is not None:
            require(model, "recommend")
        histories = Histories(model, asked.events, asked.latest, columns)
        if asked.store:
            streams = model.streams(store=asked.store, capacity=fill.MANY)
            with contextlib.closing(streams) as store:
                filled = fill.fill(histories, store)
            text = "%s: %s users with %s items were written; %s users were written before."
            logging.info(text, asked.store, *(f"{count:,}" for count in filled))
        if target is not None:
            users = _recommend(model, histories, target, asked.k, asked.exclude_seen)
            logging.info("%s: %d items for each of %s users.", asked.out, asked.k, f"{users:,}")
    except Stopped as stopped:
        logging.warning("Stopped: %s.", stopped)
        return EXIT_PREEMPTED
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def _check_flags(asked: Any) -> None:
    """Raises ValueError for a flag that is missing, and for one that nothing would read."""
    for name in ("workdir", "events"):
        if not asked[name].value:
            raise ValueError(f"--{name} is missing: give --workdir, --events, and --out or --store")
    if not (asked.out or asked.store):
        cure = "--out=recs.csv writes recommendations, --store=streams.lmdb fills a store"
        raise ValueError(f"--out and --store are missing: {cure}; both may be given")
    for name in () if asked.out else ("k", "exclude_seen"):
        if asked[name].present:
            raise ValueError(f"--{name} is about recommendations: add --out, or leave it out")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "workdir", "", "Workdir of a trained model; for --out one that ranks items."
    )
    flags.DEFINE_string("events", "", "File of events, or a folder of such files.")
    flags.DEFINE_string("out", "", "File of recommendations to write: .parquet or .csv.")
    help_text = (
        "Store to fill with every user's events, for rmjax.serve; made if it is missing. After a "
        "kill the same line writes the users that are missing. A user with another stream in the "
        "store is an error, and nothing is written."
    )
    flags.DEFINE_string("store", "", help_text)
    flags.DEFINE_integer("k", 10, "Items of each user.", lower_bound=1)
    help_text = "Leaves out items that the user has already; by default as the evaluation did."
    flags.DEFINE_bool("exclude_seen", None, help_text)
    flags.DEFINE_integer("latest", 0, "Latest events of a user to read; 0: all.", lower_bound=0)
    for name, flag in _COLUMNS.items():
        help_text = f"See config.data.table.{name}; by default that of the run."
        flags.DEFINE_string(flag, None, help_text)


def cli() -> None:
    """Runs the command `python -m rmjax.recommend`."""
    command_line.run(main, define_flags)
