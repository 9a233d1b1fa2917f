"""Times and ids of any form, as integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rmjax.data.tables.files import arrow

if TYPE_CHECKING:
    import pyarrow as pa

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # as Python writes it; 18 digits always fit in an i64
_NUMBER = r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
_ZONED = r":[0-9]{2}(\.[0-9]+)? ?(Z|[-+][0-9]{2}(:?[0-9]{2})?)$"
_DATE = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"([ T]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,9})?)?"
    r"(Z|[-+]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?)?$"
)


class Clock:
    """Turns columns of times into numbers. All batches of a table must tell the time in one way.

    Integers and floats stay as they are, since only their order counts. Timestamps, dates and ISO
    texts become microseconds since 1970; without a zone they are UTC.

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
            wanted, form = "dates", pa.timestamp("us", getattr(kind, "tz", None))
        elif types.is_null(kind):
            return np.zeros(len(column), np.int64), np.zeros(len(column), bool)
        else:
            cure = "convert it to integers, floats, timestamps or ISO texts"
            raise ValueError(f"{place}, column {name}: {kind} holds no times: {cure}")
        if self.form not in (None, wanted):
            raise ValueError(f"{place}, column {name}: expected {self.expected}, found {kind}")
        self.form = wanted
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        numbers = column.cast(form, safe=False)  # nanoseconds may be cut off
        if wanted == "dates":
            numbers = numbers.cast(pa.int64())
        numbers = numbers.fill_null(0).to_numpy(zero_copy_only=False)
        return numbers, valid & np.isfinite(numbers)

    def _parse(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """`read` for texts."""
        pa = arrow()
        pc = pa.compute
        column = pc.utf8_trim(column, " ")
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
            integers = not pc.any(pc.invert(pc.match_substring_regex(chosen, _INTEGER))).as_py()
            parsed = chosen.cast(pa.int64() if integers else pa.float64())
        else:
            chosen = pc.replace_substring_regex(chosen, r"(\.[0-9]{6})[0-9]+", r"\1")
            zoned = pc.match_substring_regex(chosen, _ZONED)
            both = [_cast(pc.if_else(zoned, chosen, None), pa.timestamp("us", "UTC"))]
            both.append(_cast(pc.if_else(zoned, None, chosen), pa.timestamp("us")))
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

    def number(self, column: pa.Array, name: str, place: str) -> np.ndarray:
        """The number of every id.

        Args:
          column: ids without nulls.
          name: of the column, for errors.
          place: the table's name in errors.

        Returns:
          i32 [n].

        Raises:
          ValueError: the column's type differs from that of earlier ids.
        """
        pa = arrow()
        if not len(column):  # a column without ids may have any type
            return np.zeros(0, np.int32)
        encoded = column.dictionary_encode()
        ids = encoded.dictionary
        known = ids[:0] if self._ids is None else self._ids
        if ids.type != known.type:
            cause = f"ids are {ids.type}, but {known.type} in earlier rows"
            raise ValueError(f"{place}, column {name}: {cause}: cast them to one type")
        row = pa.compute.index_in(ids, value_set=known)
        fresh = row.is_null().to_numpy(zero_copy_only=False)
        numbers = row.fill_null(0).to_numpy().astype(np.int32)
        numbers[fresh] = len(known) + np.arange(fresh.sum())
        self._ids = pa.concat_arrays([known, ids.filter(row.is_null())])
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


def present(column: pa.Array) -> np.ndarray:
    """Where a column has a value, bool [n]; an empty string is none."""
    present = _true(column.is_valid())
    if is_text(column.type):
        present &= ~_true(arrow().compute.equal(column, ""))
    return present


def is_text(kind: pa.DataType) -> bool:
    """Whether a type of Arrow holds strings."""
    types = arrow().types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or kind == arrow().string_view()
    )


def _true(mask: pa.Array) -> np.ndarray:
    """A mask of Arrow as bool [n]; nulls are false."""
    return mask.fill_null(False).to_numpy(zero_copy_only=False).copy()


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
