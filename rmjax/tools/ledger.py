"""Records of results: one JSON file for each table, which is the only source of its numbers.

`python -m rmjax.ablate --record=FILE` writes the numbers of a record, and keeps its prose.
`docs/ledger.py` makes the pages of `docs/results/` and the tables of README.md from records.

A record has these fields:

    title      str
    question   str, what was to be found out
    setting    str, data and sizes
    commands   [str], the lines that give the numbers
    seeds      [int], or a str where rows differ
    tables     [{name, text, digits, rows}], see `grid`
    shows      [str], one finding each
    not_shown  [str], what the numbers do not show
    notes      [str], further paragraphs; may be left out
    figure     str, path from docs/results/; may be left out
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from rmjax.io import atomic, text

SETTING = "setting"  # the first column of a table whose other columns are rows of an ablation
DIGITS = 4  # decimals of a number, where the table does not say


class Cell(TypedDict, total=False):
    """A measured number.

    Attributes:
      values: one for each seed.
      mean: over seeds; left out where it follows from `values`.
      std: sample standard deviation over seeds; left out as `mean`.
      intervals: [low, high] for each of `values`.
      paper: the number of the paper.
      digits: decimals; those of the table where this is left out.
    """

    values: list[float]
    mean: float
    std: float
    intervals: list[list[float]]
    paper: float
    digits: int


Row = Mapping[str, "str | Cell"]  # {column: cell}; the first column names the row


class Numbers(TypedDict, total=False):
    """One table of a record.

    Attributes:
      name: heading; '' where the record has one table.
      text: a paragraph before the table.
      digits: decimals of numbers.
      rows: rows with the same first column; other columns may be left out.
    """

    name: str
    text: str
    digits: int
    rows: list[Row]


class Record(TypedDict, total=False):
    """A record; see the head of this module."""

    title: str
    question: str
    setting: str
    commands: list[str]
    seeds: list[int] | str
    tables: list[Numbers]
    shows: list[str]
    not_shown: list[str]
    notes: list[str]
    figure: str


_LISTS = ("commands", "tables", "shows", "not_shown")


def read(path: Path) -> Record:
    """Reads a record.

    Args:
      path: of the JSON file.

    Returns:
      The record.

    Raises:
      ValueError: the file is no JSON, or a field is missing, unknown or of another type; names the
        file and the field.
    """
    record = text.read_json(path, "mend it; rmjax/tools/ledger.py describes the fields")
    if not isinstance(record, dict):
        raise ValueError(f"{path}: must be an object with the fields of rmjax/tools/ledger.py")
    for field in record.keys() - Record.__annotations__.keys():
        raise ValueError(f"{path}: no such field {field!r}; there are {', '.join(_fields())}")
    for field in (f for f in _fields() if f not in ("notes", "figure") and f not in record):
        raise ValueError(f"{path}: the field {field!r} is missing")
    for field in _LISTS:
        if not isinstance(record[field], list):
            raise ValueError(f"{path}: the field {field!r} must be a list")
    for number, table in enumerate(record["tables"]):
        rows = table.get("rows") if isinstance(table, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{path}: tables[{number}] must be an object with a list of rows")
        for row in rows:
            if not isinstance(row, dict) or not all(map(_is_cell, row.values())):
                raise ValueError(f"{path}: tables[{number}]: a row has a cell that is no cell")
            if not isinstance(next(iter(row.values()), None), str):
                raise ValueError(f"{path}: tables[{number}]: the first cell of a row is its name")
    return Record(**record)


def _fields() -> list[str]:
    return list(Record.__annotations__)


def _is_cell(cell: object) -> bool:
    if not isinstance(cell, dict):
        return isinstance(cell, str)
    numbers = [value for key, value in cell.items() if key not in ("values", "intervals")]
    values, intervals = cell.get("values", []), cell.get("intervals", [])
    if not isinstance(values, list) or not isinstance(intervals, list):
        return False
    known = bool(cell) and cell.keys() <= Cell.__annotations__.keys()
    fits = "intervals" not in cell or len(intervals) == len(values)
    return known and fits and all(isinstance(x, int | float) for x in [*numbers, *values])


def mean(cell: Cell) -> float | None:
    """The mean of a cell; None where it has the paper's number alone."""
    values = cell.get("values", [])
    return cell.get("mean", statistics.mean(values) if values else None)


def std(cell: Cell) -> float | None:
    """The sample standard deviation of a cell; None where it has one value, or none is known."""
    values = cell.get("values", [])
    return cell.get("std", statistics.stdev(values) if len(values) > 1 else None)


def shown(cell: str | Cell, digits: int = DIGITS) -> str:
    """A cell as text: 'mean ± std', or the mean where there is no std.

    Args:
      cell: a number, or a text, which is returned as it is.
      digits: decimals, where the cell does not say.

    Returns:
      The text; '' where there is no number.
    """
    if isinstance(cell, str):
        return cell
    digits = cell.get("digits", digits)
    middle, spread = mean(cell), std(cell)
    if middle is None:
        return ""
    return f"{middle:,.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def paper(cell: str | Cell, digits: int = DIGITS) -> str:
    """The paper's number of a cell as text.

    Args:
      cell: a number with `paper`.
      digits: as in `shown`.

    Returns:
      The text.

    Raises:
      ValueError: the paper has no number there.
    """
    if isinstance(cell, str) or "paper" not in cell:
        raise ValueError(f"{cell}: the paper has no number")
    own = len(str(cell["paper"]).partition(".")[2])  # no digit of the paper is rounded away
    return f"{cell['paper']:,.{max(own, cell.get('digits', digits))}f}"


def grid(table: Numbers) -> list[list[str]]:
    """The cells of a table as texts.

    A column is followed by '<column>, by seed' where the values of several seeds are known, and by
    '<column>, paper' where the paper has numbers.

    Args:
      table: of a record.

    Returns:
      The head and the rows.
    """
    rows, digits = table["rows"], table.get("digits", DIGITS)
    columns: list[tuple[str, str]] = []  # (column, part)
    for column in dict.fromkeys(name for row in rows for name in row):
        cells = [row[column] for row in rows if column in row]
        numbers = [cell for cell in cells if not isinstance(cell, str)]
        if not numbers or len(numbers) < len(cells) or any(mean(c) is not None for c in numbers):
            columns.append((column, ""))
        if any(len(cell.get("values", [])) > 1 for cell in numbers):
            columns.append((column, "by seed"))
        if any("paper" in cell for cell in numbers):
            columns.append((column, "paper"))
    head = [", ".join(filter(None, column)) for column in columns]
    return [head, *([_part(row.get(c, ""), part, digits) for c, part in columns] for row in rows)]


def _part(cell: str | Cell, part: str, digits: int) -> str:
    if not part:
        return shown(cell, digits)
    if isinstance(cell, str):
        return ""
    digits = cell.get("digits", digits)
    if part == "paper":
        return paper(cell, digits) if "paper" in cell else ""
    intervals = cell.get("intervals", [None] * len(cell.get("values", [])))
    return ", ".join(
        f"{value:.{digits}f}" + (f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})" if ends else "")
        for value, ends in zip(cell.get("values", []), intervals, strict=True)
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
      rows: the head and the rows, all of the same length.

    Returns:
      The lines of the table, which end with a line break.
    """
    head, *others = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    padded = [[f" {cell} " if cell else " " for cell in line] for line in [head, *others]]
    padded.insert(1, ["---"] * len(head))
    return "".join(f"|{'|'.join(line)}|\n" for line in padded)


def keep(path: Path, record: Record) -> None:
    """Writes the numbers of a record; an older record in the file keeps its prose.

    Rows replace those of the same name in the table of the same name. All other rows stay, and so
    do other columns of a row that names a setting. If any stays, so do the commands and the seeds
    of the older record, beside the new ones.

    Args:
      path: of the JSON file.
      record: title, commands, seeds and tables.

    Raises:
      ValueError: the file is there, and is no record.
    """
    before: Record = read(path) if path.exists() else {}
    names = [table.get("name", "") for table in record["tables"]]
    new = dict(zip(names, record["tables"], strict=True))
    tables: list[Numbers] = []
    for old in before.get("tables", []):
        name = old.get("name", "")
        # Prose of a table stays: its numbers alone are measured anew.
        tables.append({**old, **(_with_rows(old, new.pop(name)) if name in new else {})})
    commands, seeds = record["commands"], record["seeds"]
    if _names(before) - _names(record):
        commands = list(dict.fromkeys([*before["commands"], *commands]))
        old_seeds = before["seeds"]  # a text stays: somebody has described them
        seeds = old_seeds if isinstance(old_seeds, str) else sorted({*old_seeds, *seeds})
    full: Record = {
        "title": record["title"], "question": "", "setting": "", "shows": [], "not_shown": [],
        **before, "commands": commands, "seeds": seeds, "tables": [*tables, *new.values()],
    }  # fmt: skip
    ordered = {field: full.get(field) for field in _fields() if field in full}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def _names(record: Record) -> set[tuple[object, ...]]:
    """(table, row) of all rows of a record; (table, row, column) where a row names a setting."""
    return {
        (table.get("name", ""), next(iter(row.values())), *column)
        for table in record.get("tables", [])
        for row in table["rows"]
        for column in (((key,) for key in row) if next(iter(row)) == SETTING else ((),))
    }


def _with_rows(old: Numbers, new: Numbers) -> Numbers:
    """The new table, with the rows of the old one that it does not have, in the old order."""
    by_name = lambda rows: {next(iter(row.values())): row for row in rows}
    before = by_name(old["rows"])
    rows = {
        name: {**before.get(name, {}), **row} if next(iter(row)) == SETTING else row
        for name, row in by_name(new["rows"]).items()
    }
    return {**new, "rows": [*{**before, **rows}.values()]}
