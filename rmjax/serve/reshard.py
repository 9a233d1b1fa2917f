"""Copies the users of one range of hashes from a database into another one.

    python -m rmjax.reshard --source=old/0.lmdb --target=new/3.lmdb --shard=3/5

This splits and merges the stores of a service: call it for each old store and each new shard. The
target may also be a new database that is carried to another machine, and is the source there.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags, logging

from rmjax import command_line
from rmjax.io import terminal
from rmjax.run import environment
from rmjax.serve.database import Damaged, Database, Row, User
from rmjax.serve.shards import shard_of

_MANY = 1024  # users of one transaction


class Copied(NamedTuple):
    """What a copy has done.

    Attributes:
      users: number of users that were copied.
      present: number of users whom the target had already, with the same stream.
      damaged: users whose rows are damaged in the source; they were not copied.
    """

    users: int
    present: int
    damaged: list[User]


def copy(source: str | Path, target: str | Path, shard: int = 0, shards: int = 1) -> Copied:
    """Copies the users of a shard with their streams. The source stays as it is.

    A user of the target is never overwritten. If the copy is interrupted, the target holds some of
    the users, each with a complete stream, and a second call copies the others.

    Args:
      source: the folder of a database that no other process has open, so that no write is missed.
      target: the folder of another one, which is made if there is none.
      shard: number of the shard, 0 .. shards - 1.
      shards: how many shards exist; 1: all users are copied.

    Returns:
      The counts.

    Raises:
      FileNotFoundError: there is no source.
      ValueError: the shard does not exist; the databases belong to two models; or the target has
        another stream of a user. Nothing was copied.
      RuntimeError: another process has one of the databases open.
      OSError: the disk has no room.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} of {shards}: shards have the numbers 0 to {shards - 1}")
    with (
        contextlib.closing(Database(source)) as old,
        contextlib.closing(Database(target, old.about)) as new,
    ):
        for rows in _rows(old, shard, shards):
            _check(new, rows, source)
        count, present = 0, 0
        damaged: list[User] = []
        for rows in _rows(old, shard, shards):
            good = {user: row for user, row in rows.items() if isinstance(row, Row)}
            missing = good.keys() - new.read(good)
            new.commit({user: good[user] for user in missing})
            count, present = count + len(missing), present + len(good) - len(missing)
            damaged += rows.keys() - good.keys()
    return Copied(count, present, damaged)


def _rows(database: Database, shard: int, shards: int) -> Iterator[dict[User, Row | Damaged]]:
    """The rows of a shard, some at a time."""
    users = (user for user in database.users() if shard_of(user, shards) == shard)
    while some := list(itertools.islice(users, _MANY)):
        yield database.read(some)


def _check(new: Database, rows: Mapping[User, Row | Damaged], source: str | Path) -> None:
    """Raises ValueError if a database has another stream, or a damaged one, of a user."""
    for user, row in new.read(rows).items():
        if isinstance(row, Damaged):
            raise row
        if isinstance(rows[user], Row) and row != rows[user]:
            raise ValueError(
                f"user {user!r} has another stream in {new.path} than in {source}: nothing was "
                "copied. Reset the user in one of them, or give another target"
            )


def parsed(shard: str) -> tuple[int, int]:
    """Reads the flag --shard.

    Args:
      shard: such as '3/5'.

    Returns:
      Number of the shard, and how many shards exist.

    Raises:
      ValueError: it has another form.
    """
    parts = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not parts:
        raise ValueError(f"--shard={shard}: give a shard and how many exist, such as 3/5")
    return int(parts[1]), int(parts[2])


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    terminal.plain_logs()
    asked = flags.FLAGS
    try:
        for name in ("source", "target"):
            if not asked[name].value:
                raise ValueError(f"--{name} is missing: give the folders of two databases")
        copied = copy(asked.source, asked.target, *parsed(asked.shard))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    text = "%s: users copied: %s; users who had the same stream already: %s."
    logging.info(text, asked.target, f"{copied.users:,}", f"{copied.present:,}")
    if copied.damaged:
        shown = ", ".join(map(repr, copied.damaged[:3])) + (", ..." * (len(copied.damaged) > 3))
        text = "%s users are damaged in %s and were not copied: %s."
        logging.error(text, f"{len(copied.damaged):,}", asked.source, shown)
    return 1 if copied.damaged else 0


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("source", "", "Database to copy from; no process may have it open.")
    flags.DEFINE_string("target", "", "Database to copy into; it is made if there is none.")
    flags.DEFINE_string("shard", "0/1", "Shard to copy and number of shards; 0/1: all users.")


def cli() -> None:
    """Runs the command `python -m rmjax.reshard`."""
    command_line.run(main, define_flags)
