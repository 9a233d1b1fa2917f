"""The usable rows of a user's table of events, read in batches.

A row that cannot be used is an error, which names the file, the row, the column and the cure. With
`bad_rows=skip` it is left out and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rmjax.data.tables.files import Part, arrow, named
from rmjax.data.tables.values import Clock, ids_of, present
from rmjax.registry import names_in

if TYPE_CHECKING:
    import pyarrow as pa

_TYPED = re.compile(r"(.+):(?:token|float|token_seq|float_seq)")  # RecBole's atomic files


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns are read, and which rows are kept.

    Attributes:
      user: the column of users.
      item: the column of items.
      time: the column of times.
      session: the column of sessions; '': none.
      event: the column of kinds of events; '': none.
      events: the kinds that are kept, separated by commas.
      bad_rows: 'error', or 'skip': rows that cannot be used are left out and counted.
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    session: str = ""
    event: str = ""
    events: str = ""
    bad_rows: str = "error"

    def named(self) -> dict[str, str]:
        """{key of the config: column}, for the columns that are read."""
        keys = ("user", "item", "time", "session", "event")
        return {key: getattr(self, key) for key in keys if getattr(self, key)}


class Rows(NamedTuple):
    """Usable rows: Arrow arrays of ids without nulls, times i64 or f64 [n], and their part."""

    user: pa.Array
    item: pa.Array
    session: pa.Array | None
    time: np.ndarray
    place: str  # of the part, for errors


@dataclasses.dataclass
class Report:
    """What was read.

    Attributes:
      rows: all rows.
      skipped: {reason: rows that were left out for it}.
      kinds: {kind of event: rows}; empty if there is no such column.
    """

    rows: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def left_out(self, columns: Columns) -> dict[str, int]:
        """{reason: rows left out}, those of other kinds of events included."""
        other = self.kinds.total() - sum(self.kinds[kind] for kind in names_in(columns.events))
        return dict(self.skipped) | ({"other events": other} if other else {})


def read(parts: Iterable[Part], columns: Columns, report: Report) -> Iterator[Rows]:
    """Reads the usable rows of a table.

    Args:
      parts: of `parts_of`.
      columns: what is read.
      report: is counted up.

    Yields:
      Batches, in the order of the rows.

    Raises:
      ValueError: a column is missing, or its type cannot be used; or a row cannot be used, and
        `columns.bad_rows` is 'error'.
      Stopped: the run was asked to stop.
    """
    clock = Clock()
    for part in parts:
        chosen = _chosen(part, columns)
        row = 0

        def malformed(number: int, line: str, place: str = part.place) -> None:
            if columns.bad_rows == "error":
                raise _bad(place, number, "(all)", "as many fields as the header has", line)
            report.rows += 1
            report.skipped["a wrong number of fields"] += 1

        with named(part.place):
            for batch in part.read([*chosen.values()], malformed):
                picked = {key: batch.column(name) for key, name in chosen.items()}
                yield _usable(picked, chosen, columns, part, row, clock, report)
                row += len(batch)
                report.rows += len(batch)


def refuse_nothing(place: str, columns: Columns, report: Report, usable: int) -> None:
    """Checks that a table that was read has events.

    Args:
      place: the table's name.
      columns: what was read.
      report: of `read`.
      usable: number of usable rows.

    Raises:
      ValueError: there are none, or a kind of event that is to be kept does not occur.
    """
    missing = [kind for kind in names_in(columns.events) if kind not in report.kinds]
    if missing and report.rows:
        kinds = [kind for kind, _ in report.kinds.most_common(10)]
        near = difflib.get_close_matches(missing[0], kinds, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        cause = f"no row of column {columns.event} is {missing[0]!r}"
        option = "config.data.table.events (--kinds of rmjax.recommend)"
        cure = f"set {option}; there are {', '.join(map(repr, kinds))}"
        raise ValueError(f"{place}: {cause}: {hint}{cure}")
    if not usable:
        skipped = "".join(f", {count:,} with {reason}" for reason, count in report.skipped.items())
        raise ValueError(f"{place}: no events in {report.rows:,} rows{skipped}: take another table")


def digest(part: Part, columns: Columns) -> str:
    """The SHA-256 of a data frame's columns, in the frame's order of rows."""
    content = hashlib.sha256()
    for batch in part.read([*_chosen(part, columns).values()], lambda *_: None):
        content.update(batch.schema.serialize())
        content.update(batch.serialize())
    return content.hexdigest()


def _usable(
    batch: dict[str, pa.Array],
    names: dict[str, str],
    columns: Columns,
    part: Part,
    before: int,
    clock: Clock,
    report: Report,
) -> Rows:
    """The rows of a batch that can be used; `before` counts the rows of earlier batches."""
    pc = arrow().compute
    number = np.arange(len(batch["user"])) + before + 1
    if "event" in batch:
        kind = ids_of(batch["event"], names["event"], part.place).cast("large_string")
        missing = np.flatnonzero(~present(kind))
        if missing.size and columns.bad_rows == "error":
            row, value = int(missing[0]), batch["event"][int(missing[0])].as_py()
            expected = "a kind of event"
            raise _bad(part.place, int(number[row]), names["event"], expected, value)
        if missing.size:
            report.skipped["no kind of event"] += missing.size
        counted = pc.value_counts(kind.drop_null()).to_pylist()
        report.kinds.update({entry["values"]: entry["counts"] for entry in counted})
        wanted = pc.is_in(kind, value_set=arrow().array(names_in(columns.events), kind.type))
        batch = {key: column.filter(wanted) for key, column in batch.items() if key != "event"}
        number = number[wanted.to_numpy(zero_copy_only=False)]
    keys = [key for key in batch if key != "time"]
    ids = {key: ids_of(batch[key], names[key], part.place) for key in keys}
    time, clear = clock.read(batch["time"], names["time"], part.place)
    good = np.ones(len(number), bool)
    checked = [(key, present(column), "an id", "no id") for key, column in ids.items()]
    checked.append(("time", present(batch["time"]), "a time", "no time"))
    checked.append(("time", clear, clock.expected, "a time that cannot be read"))
    for key, right, expected, reason in checked:
        wrong = np.flatnonzero(good & ~right)
        if wrong.size and columns.bad_rows == "error":
            value = batch[key][int(wrong[0])].as_py()
            raise _bad(part.place, int(number[wrong[0]]), names[key], expected, value)
        if wrong.size:
            report.skipped[reason] += len(wrong)
        good &= right
    kept = {key: column.filter(arrow().array(good)) for key, column in ids.items()}
    return Rows(kept["user"], kept["item"], kept.get("session"), time[good], part.place)


def _chosen(part: Part, columns: Columns) -> dict[str, str]:
    """{key of the config: the part's column}; RecBole's 'user_id:token' is also called user_id."""
    plain = {name: name for name in part.names}
    typed = {name: match[1] for name in part.names if (match := _TYPED.fullmatch(name))}
    called = plain | ({name: short for name, short in typed.items()} if not part.typed else {})
    chosen = {}
    for key, wanted in columns.named().items():
        fitting = [name for name, short in called.items() if wanted in (name, short)]
        if len(fitting) == 1 and list(part.names).count(fitting[0]) == 1:
            chosen[key] = fitting[0]
            continue
        near = difflib.get_close_matches(wanted, called.values(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near and not fitting else ""
        cause = f"there are two columns {wanted!r}" if fitting else f"there is no column {wanted!r}"
        listed = ", ".join(map(repr, called.values()))
        cure = f"set config.data.table.{key} (--{key} of rmjax.recommend); the columns are {listed}"
        raise ValueError(f"{part.place}: {cause}: {hint}{cure}")
    return chosen


def _bad(place: str, row: int, column: str, expected: str, actual: object) -> ValueError:
    shown = repr(actual)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    cure = "mend it, or set config.data.table.bad_rows=skip"
    return ValueError(
        f"{place}, row {row}, column {column}: expected {expected}, found {shown}: {cure}"
    )
