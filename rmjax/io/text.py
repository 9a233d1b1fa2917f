"""Text files as people have them.

Readers accept byte order marks, Windows line ends, blank last lines and wrong encodings.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from absl import logging

from rmjax.io.progress import Progress

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ESCAPED = re.compile("[\udc80-\udcff]")
_LINES = 1024  # between two checks whether to stop


def encoding_of(start: bytes) -> str:
    """The encoding named by the byte order mark in a file's first four bytes; else UTF-8."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def read_text(path: Path) -> str:
    """The text of a file, without its byte order mark.

    Bytes that are not UTF-8 become U+FFFD, with a warning.

    Args:
      path: the file.

    Returns:
      The text.

    Raises:
      ValueError: the file begins as UTF-16 or UTF-32, but is not.
      OSError: the file cannot be read.
    """
    return decode(path.read_bytes(), path)


def decode(data: bytes, path: Path) -> str:
    """As `read_text`, for bytes that are already read, such as a member of an archive.

    Args:
      data: the bytes.
      path: their name in messages.

    Returns:
      The text.

    Raises:
      ValueError: the bytes begin as UTF-16 or UTF-32, but are not.
    """
    encoding = encoding_of(data[:4])
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    try:
        text = data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        cause = f"begins as {encoding.upper()}, but {error.reason} at byte {error.start}"
        raise ValueError(f"{path}: {cause}") from error
    text, wrong = replaced(text)
    _warn(path, wrong)
    return text


def replaced(text: str) -> tuple[str, int]:
    """A text decoded with "surrogateescape", with U+FFFD for wrong bytes; and their number."""
    return (text, 0) if text.isascii() else _ESCAPED.subn("\ufffd", text)


def as_utf8(stream: IO[bytes], size: int, place: str) -> tuple[IO[bytes], int, int]:
    """Converts a stream to UTF-8 if its byte order mark names another encoding.

    Args:
      stream: at its start, and able to seek.
      size: bytes in it.
      place: its name in errors.

    Returns:
      A stream that the caller closes, and the offsets of the text's first byte and end in it. For
      UTF-8 this is `stream` itself, otherwise a temporary file.

    Raises:
      ValueError: the stream begins as UTF-16 or UTF-32, but is not.
    """
    encoding = encoding_of(stream.read(4))
    stream.seek(0)
    if encoding.startswith("utf-8"):
        return stream, len(codecs.BOM_UTF8) * (encoding == "utf-8-sig"), size
    converted = tempfile.TemporaryFile()  # noqa: SIM115
    decoder = codecs.getincrementaldecoder(encoding)()
    progress = Progress(f"converting {place}", size)
    try:
        while block := stream.read(1 << 16):
            progress.step(len(block))
            converted.write(decoder.decode(block).encode())
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        message = f"{place}: begins as {encoding.upper()} and goes on otherwise ({error})"
        raise ValueError(message) from error
    finally:
        progress.close()
    return converted, 0, converted.tell()


def split_lines(text: str, path: Path) -> list[str]:
    """The lines of a text, as `read_lines` yields them, with the warning of an unended last line.

    Args:
      text: of the file.
      path: its name in the warning.

    Returns:
      The lines, without line ends.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    cut = bool(lines[-1].strip())
    while lines and not lines[-1].strip():
        lines.pop()
    if cut:
        _warn_of_end(path, len(lines))
    return lines


def read_lines(path: Path, ended: bool = True) -> Iterator[tuple[int, str]]:
    r"""Reads the lines of a file one by one.

    A byte order mark is dropped, and obeyed if it means UTF-16 or UTF-32. Blank lines at the end
    are left out. Bytes that are not UTF-8 become U+FFFD, and a warning counts them. Another warning
    says that the last line has no line end, since the file may have been cut short.

    Args:
      path: the file.
      ended: False turns that last warning off, for lines that show their end by themselves.

    Yields:
      (number of the line from 1, line without its end \n or \r\n).

    Raises:
      ValueError: the file begins as UTF-16 or UTF-32, but is not.
      OSError: the file cannot be read.
      Stopped: the run was asked to stop.
    """
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    strict = not encoding.startswith("utf-8")
    reading = contextlib.closing(Progress(f"reading {path}", path.stat().st_size))
    number, blank, wrong, line = 0, 0, 0, ""
    errors = "strict" if strict else "surrogateescape"
    with (
        reading as progress,
        path.open("rb") as file,
        io.TextIOWrapper(file, encoding, errors, newline="\n") as lines,
    ):
        try:
            for number, line in enumerate(lines, 1):
                if number % _LINES == 0:
                    progress.to(file.tell())
                text, more = replaced(line.rstrip("\r\n"))
                wrong += more
                if not text.strip():
                    blank += 1
                    continue
                for place in range(number - blank, number):
                    yield place, ""
                blank = 0
                yield number, text
        except UnicodeDecodeError as error:
            cause = f"not {encoding.upper()} ({error.reason})"
            raise ValueError(f"{path}, after line {number}: {cause}") from error
    _warn(path, wrong)
    if ended and line.strip() and not line.endswith("\n"):
        _warn_of_end(path, number)


def read_json(path: Path, cure: str = "mend it, or fetch it again") -> Any:
    """The content of a JSON file.

    Args:
      path: the file.
      cure: ends the error of a damaged file.

    Returns:
      The value.

    Raises:
      ValueError: the file is no JSON, is nested too deep, or has a number of too many digits; names
        the file and line.
      OSError: the file cannot be read.
    """
    return parse_json(read_text(path), str(path), cure)


def parse_json(text: str, place: str, cure: str = "mend it, or fetch the file again") -> Any:
    """The content of JSON text.

    Args:
      text: JSON.
      place: the file's name in errors; and the line, if the text is one line of many.
      cure: ends the error of damaged text.

    Returns:
      The value.

    Raises:
      ValueError: as `read_json`.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        cause = "the file is empty" if not text.strip() else f"{where}: {error.msg}"
        raise ValueError(f"{place}: no whole JSON: {cause}; {cure}") from error
    except (ValueError, RecursionError) as error:  # over 4,300 digits; lists in lists in lists
        deep = isinstance(error, RecursionError)
        cause = "nested too deep" if deep else str(error).partition(";")[0]
        raise ValueError(f"{place}: JSON that cannot be read: {cause}; {cure}") from error


def _warn_of_end(path: Path, number: int) -> None:
    message = "%s: line %d, the last, has no end: if the file was cut short, fetch it again."
    logging.warning(message, path, number)


def _warn(path: Path, wrong: int) -> None:
    message = "%s: %d bytes are not UTF-8, and were replaced: save the file as UTF-8."
    if wrong:
        logging.warning(message, path, wrong)
