"""How the corpora of long documents lie on disk: which files each split has, and their text in pieces."""

from __future__ import annotations

import contextlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from rmjax.io import paths
from rmjax.io.text import as_utf8

SPLITS = ("train", "valid", "test")
PIECE = 1 << 16  # about as many bytes are read, and made tokens, at once
LONGEST = 1 << 20  # bytes without white space, after which a piece ends between any two characters
_CUT = re.compile(rb".+(?:(?= \S)|(?<=\S)(?=\r?\n\S))", re.DOTALL)
Pieces = Iterator[tuple[str | None, str]]
"""Text in pieces: with the first of a document comes its name, with its others None. Bytes that are not UTF-8 are lone
surrogates (errors="surrogateescape")."""


class Corpus(NamedTuple):
    """Which files each split has, and how they are read.

    Attributes:
      files: of each split.
      read: (split, one of its files) -> its text in pieces, without a byte order mark.
      words: of a piece, how many.
      characters: of a piece, how many.
      parts: (a, b, c) where all splits share their files: in each file 'valid' begins at a / c of
        its size and 'test' at b / c.
      titled: whether the name of a document is in its text.
      verbatim: whether every byte of a file is read as it stands.
    """

    files: dict[str, list[Path]]
    read: Callable[[str, Path], Pieces]
    words: Callable[[str], int] = lambda text: len(text.split())
    characters: Callable[[str], int] = len
    parts: tuple[int, int, int] | None = None
    titled: bool = False
    verbatim: bool = False

    def size(self, split: str) -> int:
        """Bytes that the files of a split have. UTF-16 and UTF-32 become UTF-8 of another size."""
        size = 0
        for file in self.files[split]:
            with _opened(file) as (_, of_file):
                size += of_file
        if self.parts:
            first, last = _part(split, self.parts)
            size = size * (last - first) // self.parts[2]
        return size


def folders(root: Path, names: dict[str, list[str]], advice: str) -> dict[str, list[Path]]:
    files = {
        split: [file for folder in folders for file in text_files(root / folder)]
        for split, folders in names.items()
    }
    for split, found in files.items():
        if not found:
            raise FileNotFoundError(f"no .txt file in {root / names[split][0]}. {advice}")
    return files


def text_files(folder: Path) -> list[Path]:
    """Numbers by their value, then names."""
    files = [file for file in paths.visible(folder, "*.txt") if file.is_file()]
    return sorted(
        files,
        key=lambda file: (int(file.stem) if file.stem.isdecimal() else float("inf"), file.name),
    )


def book(path: Path, name: str) -> Pieces:
    with path.open("rb") as file:
        stream, begin, end = as_utf8(file, path.stat().st_size, str(path))
        with stream:
            yield from _pieces(stream, begin, end, name)


def _part(split: str, parts: tuple[int, int, int]) -> tuple[int, int]:
    """Where a split begins and ends in a file that all of them share."""
    return dict(train=(0, parts[0]), valid=parts[:2], test=parts[1:])[split]


def parted(split: str, path: Path, parts: tuple[int, int, int], verbatim: bool) -> Pieces:
    with _opened(path) as (file, size):
        stream, begin, end = (file, 0, size) if verbatim else as_utf8(file, size, str(path))

        def place(part: int) -> int:
            exact = begin + (end - begin) * part // parts[2]
            return exact if verbatim or exact in (begin, end) else _between_words(stream, exact)

        with stream:
            first, last = map(place, _part(split, parts))
            yield from _pieces(stream, first, last, f"{path.stem} {split}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A file, or what a .zip has of enwik8, and its size."""
    if path.suffix != ".zip":
        with path.open("rb") as file:
            yield file, path.stat().st_size
        return
    with contextlib.ExitStack() as held:
        file = held.enter_context(path.open("rb"))
        try:
            archive = held.enter_context(zipfile.ZipFile(file))
            member = held.enter_context(archive.open("enwik8"))
        except (
            Exception
        ) as error:  # what zipfile raises of a damaged or encrypted archive is not listed anywhere
            raise _no_archive(path, error) from error
        try:
            yield member, archive.getinfo("enwik8").file_size
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _no_archive(path, error) from error


def _no_archive(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: no whole archive of a file enwik8 ({error}). Fetch enwik8.zip again, from http://mattmahoney.net/dc/enwik8.zip"
    )


def _between_words(stream: IO[bytes], place: int) -> int:
    """Where the first white space is from `place` on, or the first character if none is nearby."""
    stream.seek(place)
    ahead = stream.read(PIECE)
    between = re.search(rb"\s", ahead) or re.search(rb"[^\x80-\xbf]", ahead)
    return place + between.start() if between else place


def _pieces(stream: IO[bytes], begin: int, end: int, name: str) -> Pieces:
    """The text between two places. A piece ends before white space, where tokenizers cut too."""
    stream.seek(begin)
    names, rest = iter([name]), b""
    while block := stream.read(min(end - begin, PIECE)):
        begin += len(block)
        seen = max(0, len(rest) - 3)  # no cut is before: the last bytes alone lacked what follows
        rest += block
        cut = _CUT.match(rest, seen)
        place = cut.end() if cut else _between_characters(rest) if len(rest) >= LONGEST else 0
        if begin < end and place:
            yield next(names, None), rest[:place].decode("utf-8", "surrogateescape")
            rest = rest[place:]
    if rest:
        yield next(names, None), rest.decode("utf-8", "surrogateescape")


def _between_characters(data: bytes) -> int:
    """Where the last character of `data` begins."""
    return next(
        (i for i in range(len(data) - 1, len(data) - 5, -1) if data[i] & 0xC0 != 0x80), len(data)
    )
