"""Text files as people have them: byte order marks, Windows line ends, blank last lines, other encodings."""

from __future__ import annotations

import codecs
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
_LINES = 1024  # between two looks at whether to stop


def encoding_of(start: bytes) -> str:
    """The encoding that a file's first four bytes say: by its byte order mark, or UTF-8."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def read_text(path: Path) -> str:
    """The text of a file, without its byte order mark. Bytes of another encoding become U+FFFD, with a warning.

    Raises:
      ValueError: a file that begins as UTF-16 or UTF-32 goes on otherwise.
      OSError: it cannot be read.
    """
    return decode(path.read_bytes(), path)


def decode(data: bytes, path: Path) -> str:
    """As `read_text`, of bytes read before, such as those of an archive's member. `path` is what messages call them."""
    encoding = encoding_of(data[:4])
    try:
        text = data.decode(
            encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict"
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: begins as {encoding.upper()}, but {error.reason} at byte {error.start}"
        ) from error
    text, wrong = replaced(text)
    _warn(path, wrong)
    return text


def replaced(text: str) -> tuple[str, int]:
    """`text` with U+FFFD for each byte that errors="surrogateescape" kept, and how many there were."""
    return (text, 0) if text.isascii() else _ESCAPED.subn("\ufffd", text)


def as_utf8(stream: IO[bytes], size: int, place: str) -> tuple[IO[bytes], int, int]:
    """A stream that begins with a byte order mark, or does not, as UTF-8.

    Args:
      stream: at its begin; one that can seek.
      size: bytes in it.
      place: what errors call it.

    Returns:
      A stream that the caller closes, and where the text begins and ends in it. The stream is
      `stream` itself if that is UTF-8, otherwise a temporary file.

    Raises:
      ValueError: it begins as UTF-16 or UTF-32 and goes on otherwise.
    """
    encoding = encoding_of(stream.read(4))
    stream.seek(0)
    if encoding.startswith("utf-8"):
        return stream, len(codecs.BOM_UTF8) * (encoding == "utf-8-sig"), size
    converted = tempfile.TemporaryFile()  # noqa: SIM115
    decoder, progress = (
        codecs.getincrementaldecoder(encoding)(),
        Progress(f"converting {place}", size),
    )
    try:
        while block := stream.read(1 << 16):
            progress.step(len(block))
            converted.write(decoder.decode(block).encode())
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        message = f"{place}: begins as {encoding.upper()} and goes on otherwise ({error})"
        raise ValueError(message) from error
    return converted, 0, converted.tell()


def split_lines(text: str, path: Path) -> list[str]:
    """The lines of a text, as `read_lines` gives them, with its warning of a last line without an end."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    cut = bool(lines[-1].strip())
    while lines and not lines[-1].strip():
        lines.pop()
    if cut:
        _warn_of_end(path, len(lines))
    return lines


def read_lines(path: Path, ended: bool = True) -> Iterator[tuple[int, str]]:
    r"""The lines of a file and their numbers, from 1, without line ends (\n or \r\n), read one by one.

    A byte order mark is dropped, or obeyed where it says UTF-16 or UTF-32. Blank lines at the end are left out.
    Bytes of another encoding become U+FFFD, and a warning counts them. Another warning names a last line without an
    end, since a file that was cut short has one. `ended=False` leaves that out, for lines that show their own end.

    Raises:
      ValueError: a file that begins as UTF-16 or UTF-32 goes on otherwise.
      OSError: it cannot be read.
      Stopped: the run was asked to stop.
    """
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    strict = not encoding.startswith("utf-8")
    progress = Progress(f"reading {path}", path.stat().st_size)
    number, blank, wrong, line = 0, 0, 0, ""
    errors = "strict" if strict else "surrogateescape"
    with path.open("rb") as file, io.TextIOWrapper(file, encoding, errors, newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if number % _LINES == 0:
                    progress.to(file.tell())
                text = line.rstrip("\r\n")
                text, more = replaced(text)
                wrong += more
                if not text.strip():
                    blank += 1
                    continue
                for place in range(number - blank, number):
                    yield place, ""
                blank = 0
                yield number, text
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, after line {number}: not {encoding.upper()} ({error.reason})"
            ) from error
    _warn(path, wrong)
    if ended and line.strip() and not line.endswith("\n"):
        _warn_of_end(path, number)


def read_json(path: Path, cure: str = "mend it, or fetch it again") -> Any:
    """What a JSON file holds. `cure` ends what is said of a damaged one.

    Raises:
      ValueError: it is no JSON, or is nested too deep, or has a number of too many digits; names the file and line.
      OSError: it cannot be read.
    """
    return parse_json(read_text(path), str(path), cure)


def parse_json(text: str, place: str, cure: str = "mend it, or fetch the file again") -> Any:
    """What JSON text holds. `place` names the file, and where it is one line of many, the line.

    Raises:
      ValueError: as `read_json`.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        cause = "the file is empty" if not text.strip() else f"{where}: {error.msg}"
        raise ValueError(f"{place}: no whole JSON: {cause}; {cure}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of over 4,300 digits; lists in lists in lists
        cause = (
            "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        )
        raise ValueError(f"{place}: JSON that cannot be read: {cause}; {cure}") from error


def _warn_of_end(path: Path, number: int) -> None:
    logging.warning(
        "%s: line %d, the last, has no end: if the file was cut short, fetch it again.",
        path,
        number,
    )


def _warn(path: Path, wrong: int) -> None:
    if wrong:
        logging.warning(
            "%s: %d bytes are not UTF-8, and were replaced: save the file as UTF-8.", path, wrong
        )
