"""The columns of a user's table of events, read in batches: CSV, Parquet, Arrow, or a data frame.

A row that cannot be used is an error, which names the file, the row, the column and the cure; or it
is left out and counted. Rows are counted from 1, without the header.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import logging

from rmjax.io import paths, text
from rmjax.registry import names_in

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1 << 20  # rows of a batch
SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
_BLOCK = 1 << 25  # bytes of a text file that are parsed at once
_TYPED = re.compile(r"(.+):(?:token|float|token_seq|float_seq)")  # RecBole's atomic files
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # as Python writes it; 18 digits always fit in an i64
_NUMBER = r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
_ZONED = r":[0-9]{2}(\.[0-9]+)? ?(Z|[-+][0-9]{2}(:?[0-9]{2})?)$"
_DATE = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"([ T]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,9})?)?"
    r"(Z|[-+]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?)?$"
)


def arrow() -> Any:
    """The package pyarrow, with its modules `compute`, `csv`, `ipc` and `parquet`.

    Raises:
      ModuleNotFoundError: it is not installed; names the extra.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.ipc
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        cure = "pip install 'rmjax[tables]'"
        raise ModuleNotFoundError(f"tables need pyarrow: {cure}", name="pyarrow") from error
    return pa


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
    """Usable rows: Arrow arrays of ids without nulls, and times i64 or f64 [n]."""

    user: pa.Array
    item: pa.Array
    session: pa.Array | None
    time: np.ndarray


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


class Part(NamedTuple):
    """A file, or a data frame.

    Attributes:
      place: its name in errors.
      names: its columns.
      typed: whether its columns have types; those of text files have none.
      read: read(columns, malformed) -> batches of these columns, in order. `malformed(row, text)`
        is called for every row that has too few or too many fields.
    """

    place: str
    names: Sequence[str]
    typed: bool
    read: Callable[[list[str], Callable[[int, str], None]], Iterable[pa.RecordBatch]]


def parts_of(events: Any) -> Iterator[Part]:
    """The parts of a table.

    Args:
      events: the path of a file or of a folder of files; or a data frame of pandas or polars, a
        table of pyarrow, or a dict of columns.

    Yields:
      The parts, in the order of the files' names.

    Raises:
      ModuleNotFoundError: pyarrow is not installed.
      FileNotFoundError: there is no such file, or the folder is empty.
      ValueError: the file's kind is unknown, or it is damaged or empty.
    """
    arrow()
    if not isinstance(events, str | Path):
        yield _frame(events)
        return
    for path in files_of(events):
        with _named(path):
            yield _text(path) if path.suffix in SEPARATORS else _arrow_file(path)


def files_of(path: str | Path) -> tuple[Path, ...]:
    """The files of a table, sorted by name; raises as `parts_of`."""
    root = paths.resolve(path, "config.data.table.path")
    files = (root,) if root.is_file() else tuple(filter(Path.is_file, paths.visible(root)))
    if not files:
        cause = "has no files" if root.is_dir() else "does not exist"
        raise FileNotFoundError(f"{root} {cause}: set config.data.table.path to a file of events")
    known = (*SEPARATORS, ".parquet", ".arrow", ".feather", ".ipc")
    for file in files:
        if file.suffix not in known:
            raise ValueError(
                f"{file}: expected a file that ends in {', '.join(known)}: rename or convert it"
            )
    return files


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

        with _named(part.place):
            for batch in part.read([*chosen.values()], malformed):
                named = {key: batch.column(name) for key, name in chosen.items()}
                yield _usable(named, chosen, columns, part, row, clock, report)
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
        cure = f"set config.data.table.events; there are {', '.join(map(repr, kinds))}"
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
        kind = ids_of(batch.pop("event"), names["event"], part.place).cast("large_string")
        counted = pc.value_counts(kind.drop_null()).to_pylist()
        report.kinds.update({entry["values"]: entry["counts"] for entry in counted})
        wanted = pc.is_in(kind, value_set=arrow().array(names_in(columns.events), kind.type))
        batch = {key: column.filter(wanted) for key, column in batch.items()}
        number = number[wanted.to_numpy(zero_copy_only=False)]
    keys = [key for key in batch if key != "time"]
    ids = {key: ids_of(batch[key], names[key], part.place) for key in keys}
    time, clear = clock.read(batch["time"], names["time"], part.place)
    good = np.ones(len(number), bool)
    checked = [(key, _present(column), "an id", "no id") for key, column in ids.items()]
    checked.append(("time", _present(batch["time"]), "a time", "no time"))
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
    return Rows(kept["user"], kept["item"], kept.get("session"), time[good])


class Clock:
    """Turns columns of times into numbers. All batches of a table must tell the time in one way.

    Integers and floats stay as they are, since only their order counts. Timestamps, dates and ISO
    texts become nanoseconds since 1970; without a zone they are UTC.

    Attributes:
      form: 'numbers' or 'dates'; None before the first time.
    """

    def __init__(self) -> None:
        self.form: str | None = None

    @property
    def expected(self) -> str:
        """What a column of texts must hold, for errors."""
        dates = "an ISO time such as 2024-01-31 or 2024-01-31T12:59:59Z"
        forms = {"numbers": "a number", "dates": dates, None: f"a number, or {dates}"}
        return f"{forms[self.form]}, as in earlier rows" if self.form else forms[None]

    def read(self, column: pa.Array, name: str, place: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads a batch.

        Args:
          column: of the table.
          name: of the column, for errors.
          place: the table's name in errors.

        Returns:
          Times i64 or f64 [n], and bool [n], which of them are times.

        Raises:
          ValueError: the column's type holds no times, or another form than earlier batches.
        """
        pa = arrow()
        types, kind = pa.types, column.type
        if types.is_dictionary(kind):
            return self.read(column.cast(kind.value_type), name, place)
        if is_text(kind):
            return self._parse(column.cast(pa.large_string()))
        if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
            wanted, form = "numbers", pa.int64() if types.is_integer(kind) else pa.float64()
        elif types.is_timestamp(kind) or types.is_date(kind):
            wanted, form = "dates", pa.timestamp("ns", getattr(kind, "tz", None))
        elif types.is_null(kind):
            return np.zeros(len(column), np.int64), np.zeros(len(column), bool)
        else:
            cure = "convert it to integers, floats, timestamps or ISO texts"
            raise ValueError(f"{place}, column {name}: {kind} holds no times: {cure}")
        if self.form not in (None, wanted):
            raise ValueError(f"{place}, column {name}: expected {self.expected}, found {kind}")
        self.form = wanted
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        numbers = column.cast(form)
        if wanted == "dates":
            numbers = numbers.cast(pa.int64())
        numbers = numbers.fill_null(0).to_numpy(zero_copy_only=False)
        return numbers, valid & np.isfinite(numbers)

    def _parse(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """`read` for texts."""
        pa = arrow()
        pc = pa.compute
        column = pc.utf8_trim_whitespace(column)
        fits = lambda pattern: _true(pc.match_substring_regex(column, pattern))
        forms = {"numbers": fits(_NUMBER), "dates": fits(_DATE)}
        if self.form is None:
            first = np.flatnonzero(forms["numbers"] | forms["dates"])
            if not first.size:
                return np.zeros(len(column), np.int64), np.zeros(len(column), bool)
            self.form = "numbers" if forms["numbers"][first[0]] else "dates"
        right = forms[self.form]
        chosen = column.filter(pa.array(right))
        if self.form == "numbers":
            whole = not pc.any(pc.invert(pc.match_substring_regex(chosen, _INTEGER))).as_py()
            parsed = chosen.cast(pa.int64() if whole else pa.float64())
        else:
            zoned = pc.match_substring_regex(chosen, _ZONED)
            both = [_cast(pc.if_else(zoned, chosen, None), pa.timestamp("ns", "UTC"))]
            both.append(_cast(pc.if_else(zoned, None, chosen), pa.timestamp("ns")))
            parsed = pc.coalesce(*(moment.cast(pa.int64()) for moment in both))
        numbers = parsed.fill_null(0).to_numpy(zero_copy_only=False)
        times = np.zeros(len(column), numbers.dtype)
        times[right] = numbers
        right[right] = _true(parsed.is_valid()) & np.isfinite(numbers)
        return times, right


class Ids:
    """Numbers ids in the order of their first appearance."""

    def __init__(self) -> None:
        self._ids: pa.Array | None = None

    def number(self, column: pa.Array) -> np.ndarray:
        """The number of every id.

        Args:
          column: ids without nulls.

        Returns:
          i32 [n].

        Raises:
          ValueError: the column's type differs from that of earlier columns.
        """
        pa = arrow()
        encoded = column.dictionary_encode()
        ids = encoded.dictionary
        known = ids[:0] if self._ids is None else self._ids
        if ids.type != known.type:
            raise ValueError(f"ids are {ids.type}, but {known.type} in earlier files: cast them")
        place = pa.compute.index_in(ids, value_set=known)
        fresh = place.is_null().to_numpy(zero_copy_only=False)
        numbers = place.fill_null(0).to_numpy().astype(np.int32)
        numbers[fresh] = len(known) + np.arange(fresh.sum())
        self._ids = pa.concat_arrays([known, ids.filter(place.is_null())])
        return numbers[encoded.indices.to_numpy()]

    def sort(self, typed: bool) -> tuple[pa.Array, np.ndarray]:
        """Sorts the ids: integers by value, strings by their characters.

        Args:
          typed: False: the ids are texts of a file without types. They are integers if all of them
            are written as Python writes integers; otherwise all are strings.

        Returns:
          The ids, and the place of every number among them, i32 [n].
        """
        pa = arrow()
        ids = pa.array([], pa.int64()) if self._ids is None else self._ids
        integers = not typed and len(ids) and is_text(ids.type)
        if integers and pa.compute.all(pa.compute.match_substring_regex(ids, _INTEGER)).as_py():
            ids = ids.cast(pa.int64())
        order = pa.compute.sort_indices(ids).to_numpy()
        rank = np.empty(len(ids), np.int32)
        rank[order] = np.arange(len(ids), dtype=np.int32)
        return ids.take(pa.array(order)), rank


def ids_of(column: pa.Array, name: str, place: str) -> pa.Array:
    """A column of ids as i64 or strings; an empty string becomes a null.

    Args:
      column: integers, strings, or categories of them.
      name: of the column, for errors.
      place: the table's name in errors.

    Returns:
      An array of type int64 or large_string.

    Raises:
      ValueError: the column has another type, or an integer beyond 64 bits.
    """
    pa = arrow()
    kind = column.type
    if pa.types.is_dictionary(kind):
        return ids_of(column.cast(kind.value_type), name, place)
    if pa.types.is_null(kind):
        return column.cast(pa.int64())
    if pa.types.is_integer(kind):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{place}, column {name}: {error}: cast ids to strings") from error
    if not is_text(kind):
        cure = "cast them to integers or strings"
        raise ValueError(f"{place}, column {name}: ids are {kind}: {cure}")
    column = column.cast(pa.large_string())
    return pa.compute.if_else(pa.compute.equal(column, ""), None, column)


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
        cure = f"set config.data.table.{key}; the columns are {listed}"
        raise ValueError(f"{part.place}: {cause}: {hint}{cure}")
    return chosen


def _text(path: Path) -> Part:
    """A file of separated values, whose first line names the columns."""
    pa = arrow()
    with path.open("rb") as file:
        encoding = text.encoding_of(file.read(4)).removesuffix("-sig")
        file.seek(max(0, path.stat().st_size - 2))
        if file.read()[-1:] not in (b"\n", b"\r", b"\0", b""):
            logging.warning("%s: the last row has no end: was the file cut short?", path)
    separator = SEPARATORS[path.suffix]

    def opened(wanted: list[str], malformed: Callable[[int, str], None]) -> Any:
        errors: list[ValueError] = []

        def judge(row: Any) -> str:
            try:
                malformed(row.number - 1, row.text)
            except ValueError as error:
                errors.append(error)
                return "error"
            return "skip"

        types = {name: pa.large_string() for name in wanted}
        # With several threads the numbers of malformed rows would be unknown.
        reading = pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK, encoding=encoding)
        quote = '"' if path.suffix != ".inter" else False
        parsing = pa.csv.ParseOptions(
            delimiter=separator, quote_char=quote, invalid_row_handler=judge
        )
        converting = pa.csv.ConvertOptions(
            include_columns=wanted,
            column_types=types,
            null_values=[""],
            strings_can_be_null=True,
        )
        try:
            reader = pa.csv.open_csv(path, reading, parsing, converting)
            yield reader
            yield from reader
        except pa.ArrowInvalid as error:
            raise (errors[0] if errors else error) from error

    names = next(opened([], lambda *_: None)).schema.names

    def batches(wanted: list[str], malformed: Callable[[int, str], None]) -> Iterator[Any]:
        reader = opened(wanted, malformed)
        next(reader)
        return reader

    return Part(str(path), names, False, batches)


def _arrow_file(path: Path) -> Part:
    """A file of Parquet or Arrow."""
    pa = arrow()
    if path.suffix == ".parquet":
        file = pa.parquet.ParquetFile(path, memory_map=True)
        batches = lambda wanted, _: file.iter_batches(ROWS, columns=wanted)
        return Part(str(path), file.schema_arrow.names, True, batches)
    with pa.memory_map(str(path)) as source:
        names = pa.ipc.open_file(source).schema.names

    def parts(wanted: list[str], _: Any) -> Iterator[Any]:
        with pa.memory_map(str(path)) as source:
            schema = pa.ipc.open_file(source).schema
            options = pa.ipc.IpcReadOptions(
                included_fields=[schema.get_field_index(n) for n in wanted]
            )
            reader = pa.ipc.open_file(source, options=options)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                for start in range(0, len(batch), ROWS):
                    yield batch.slice(start, ROWS)

    return Part(str(path), names, True, parts)


def _frame(frame: Any) -> Part:
    """A data frame, a table of pyarrow, or a dict of columns."""
    pa = arrow()
    place = f"the {type(frame).__name__}"
    names = getattr(frame, "column_names", getattr(frame, "columns", frame))
    try:
        names = [str(name) for name in names]
    except TypeError:
        cure = "give a path, a data frame of pandas or polars, a table of pyarrow, or a dict"
        raise TypeError(f"events are a {type(frame).__name__}: {cure}") from None

    def batches(wanted: list[str], _: Any) -> Iterator[Any]:
        return pa.table({name: _column(frame[name], name, place) for name in wanted}).to_batches(
            ROWS
        )

    return Part(place, names, True, batches)


def _column(values: Any, name: str, place: str) -> Any:
    """A column of a frame in Arrow's form."""
    pa = arrow()
    try:
        streams = hasattr(values, "__arrow_c_stream__")
        array = pa.chunked_array(values) if streams else pa.array(values, from_pandas=True)
        category = pa.types.is_dictionary(array.type)
        return array.cast(array.type.value_type) if category else array
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
        first: dict[type, tuple[int, object]] = {}
        for row, value in enumerate(values, 1):
            if value is not None and value == value:  # NaN, as pandas has it, is a missing value
                first.setdefault(type(value), (row, value))
        kinds = [f"row {row} holds {value!r}" for row, value in first.values()]
        mixed = f"the types are mixed ({' and '.join(kinds[:2])})" if len(kinds) > 1 else str(error)
        cure = "cast it to integers, or to strings"
        raise ValueError(f"{place}, column {name}: {mixed}: {cure}") from error


@contextlib.contextmanager
def _named(place: str | Path) -> Iterator[None]:
    """Names the file in errors of Arrow."""
    pa = arrow()
    try:
        yield
    except pa.ArrowException as error:
        cause = (str(error) or "damaged").splitlines()[0]
        cure = "save it as UTF-8" if "UTF8" in cause else "mend it, or write it again"
        raise ValueError(f"{place} cannot be read ({cause}): {cure}") from error


def _bad(place: str, row: int, column: str, expected: str, actual: object) -> ValueError:
    shown = repr(actual)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    cure = "mend it, or set config.data.table.bad_rows=skip"
    return ValueError(
        f"{place}, row {row}, column {column}: expected {expected}, found {shown}: {cure}"
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether a type of Arrow holds strings."""
    types = arrow().types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or kind == arrow().string_view()
    )


def _true(mask: pa.Array) -> np.ndarray:
    """A mask of Arrow as bool [n]; nulls are false."""
    return mask.fill_null(False).to_numpy(zero_copy_only=False).copy()


def _present(column: pa.Array) -> np.ndarray:
    """Where a column has a value, bool [n]; an empty string is none."""
    present = _true(column.is_valid())
    if is_text(column.type):
        present &= ~_true(arrow().compute.equal(column, ""))
    return present


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Casts texts; those that cannot be cast become null."""
    pa = arrow()
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, kind)
        half = len(column) // 2
        return pa.concat_arrays([_cast(part, kind) for part in (column[:half], column[half:])])
