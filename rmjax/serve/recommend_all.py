"""Recommends items to every user of a table of events.

    python -m rmjax.recommend --workdir=runs/shop --events=events.parquet --out=recs.parquet --k=10

The columns are those of the run (`config.data.table`), unless a flag names another one. With a
column of sessions, a user's latest session is read: the one that ends last. The result has the
columns user, rank (1 is the best), item and score. It is written completely or not at all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from rmjax import command_line
from rmjax.data.tables.events import Events, open_events, prepare, user_ids
from rmjax.data.tables.files import arrow
from rmjax.data.tables.rows import Columns
from rmjax.io import paths, terminal
from rmjax.io.progress import Progress, Stopped
from rmjax.run import environment
from rmjax.run.workdir import EXIT_PREEMPTED
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
    ranked, target, data = model.recommender, _target(out), model.config.data
    ours = {name: getattr(data.table, name) for name in _COLUMNS} if data.name == "table" else {}
    chosen = Columns(**{**ours, **(columns or {})})
    if isinstance(events, str):
        events = paths.resolve(events, "events")
    folder = prepare(events, chosen, data.cache_dir, data.seed)
    log, users = open_events(folder), user_ids(folder)
    index, names = ranked.names.indices(log.ids), arrow().array(ranked.names.ids.tolist())
    _report_unknown(index, log.ids, ranked.names.ids)
    bounds = np.searchsorted(log.users, np.arange(len(users) + 1))  # of each user's streams
    latest_stream = _latest_streams(log)
    progress = Progress("recommending", len(users), unit="users", size=1)

    def known(begins: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
        rows = (index[log.items[a:b]] for a, b in zip(begins, ends, strict=True))
        return [items[items >= 0] for items in rows]

    def parts() -> Iterator[pa.Table]:
        for first in range(0, len(users), _USERS):
            streams = latest_stream[first : first + _USERS]
            begin, end = log.starts[streams], log.starts[streams + 1]
            begin = np.maximum(begin, end - latest) if latest else begin
            every = log.starts[bounds[first : first + _USERS + 1]]
            seen = known(every[:-1], every[1:])
            best = ranked.best(known(begin, end), k, exclude_seen, progress.step, seen)
            exists = best.items >= 0
            row, rank = np.nonzero(exists)
            yield arrow().table(
                {
                    "user": users.take(arrow().array(first + row)),
                    "rank": arrow().array(rank + 1, arrow().int32()),
                    "item": names.take(arrow().array(best.items[exists])),
                    "score": arrow().array(best.scores[exists]),
                }
            )

    _write(parts(), target)
    progress.close()
    return len(users)


def _target(out: str | Path) -> Path:
    """The file to write; a wrong ending or a missing folder is an error."""
    target = paths.resolve(str(out), "out")
    if target.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{target}: the name must end in .parquet or .csv")
    if not target.parent.is_dir():
        cure = "make this folder, or name another file with --out"
        raise FileNotFoundError(f"{target.parent} does not exist: {cure}")
    return target


def _latest_streams(log: Events) -> np.ndarray:
    """The stream of each user that ends last, i64 [users]; the last one of those that tie."""
    ends = log.times[log.starts[1:] - 1]
    order = np.lexsort((ends, log.users))
    return order[np.searchsorted(log.users, np.unique(log.users), "right") - 1]


def _report_unknown(index: np.ndarray, ids: Sequence[Any], known: np.ndarray) -> None:
    """Counts the items that the model does not know; none may be left.

    Raises:
      ValueError: the model knows none of them.
    """
    unknown = int((index < 0).sum())
    if unknown == len(index):
        shown = f"{ids[0]!r}, and those of the model are like {known.tolist()[0]!r}"
        raise ValueError(
            f"the model knows none of the {len(ids):,} items: they are like {shown}. Name the "
            "column of items with --item, and bring ids to the same form"
        )
    if unknown:
        shown = ids[int(np.flatnonzero(index < 0)[0])]
        text = "%s of %s items are unknown to the model, such as %r: their events are left out."
        logging.warning(text, f"{unknown:,}", f"{len(index):,}", shown)


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
        for name in ("workdir", "events", "out"):
            if not asked[name].value:
                raise ValueError(f"--{name} is missing: give --workdir, --events and --out")
        logging.info("%s", environment.prepare())
        environment.find_devices()
        given = {name: asked[flag].value for name, flag in _COLUMNS.items()}
        columns = {name: value for name, value in given.items() if value is not None}
        options = asked.k, asked.exclude_seen, asked.latest
        model = open_model(asked.workdir)
        users = recommend_all(model, asked.events, asked.out, *options, columns)
        logging.info("%s: %d items for each of %s users.", asked.out, asked.k, f"{users:,}")
    except Stopped as stopped:
        logging.warning("Stopped: %s.", stopped)
        return EXIT_PREEMPTED
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", "", "Workdir of a trained model that ranks items.")
    flags.DEFINE_string("events", "", "File of events, or a folder of such files.")
    flags.DEFINE_string("out", "", "File to write: .parquet or .csv.")
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
