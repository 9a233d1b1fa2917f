"""The files of a user's table, or a data frame, as batches of chosen columns.

Text files have no types: their columns are strings. Rows are counted from 1, without the header.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging

from rmjax.io import paths, text

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1 << 20  # rows of a batch
SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
_BLOCK = 1 << 25  # bytes of a text file that are parsed at once


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
        with named(path):
            yield _text(path) if path.suffix in SEPARATORS else _arrow_file(path)


def files_of(path: str | Path) -> tuple[Path, ...]:
    """The files of a table, those in folders inside its folder too, sorted; raises as `parts_of`.

    Names that begin with a dot or an underscore are no data: Spark writes `_SUCCESS`.
    """
    root = paths.resolve(path, "config.data.table.path")
    files = (root,) if root.is_file() else tuple(_inside(root))
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


def _inside(folder: Path) -> Iterator[Path]:
    """The files in a folder and in the folders inside it."""
    for path in paths.visible(folder, "[!_]*"):
        if path.is_dir():
            yield from _inside(path)
        else:
            yield path


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
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, OverflowError) as error:
        first: dict[type, tuple[int, object]] = {}
        for row, value in enumerate(values, 1):
            if value is not None and value == value:  # NaN, as pandas has it, is a missing value
                first.setdefault(type(value), (row, value))
        kinds = [f"row {row} holds {value!r}" for row, value in first.values()]
        mixed = f"the types are mixed ({' and '.join(kinds[:2])})" if len(kinds) > 1 else str(error)
        cure = "cast it to integers of 64 bits, or to strings"
        raise ValueError(f"{place}, column {name}: {mixed}: {cure}") from error


@contextlib.contextmanager
def named(place: str | Path) -> Iterator[None]:
    """Names the file in errors of Arrow."""
    pa = arrow()
    try:
        yield
    except pa.ArrowException as error:
        cause = (str(error) or "damaged").splitlines()[0]
        if "Empty CSV" in cause:
            raise ValueError(f"{place}: the file is empty: take another") from error
        if row := re.search(r"Row #(\d+): (.*)", cause):
            where = f"{place}, row {int(row[1]) - 1}"  # Arrow counts the header
            cure = "save the file as UTF-8" if "UTF8" in cause else "mend it"
            raise ValueError(f"{where}: {row[2]}: {cure}") from error
        raise ValueError(f"{place} cannot be read ({cause}): write it again") from error
