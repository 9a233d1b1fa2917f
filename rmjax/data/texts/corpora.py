"""Corpora of long documents on disk: the files of each split, and their text in pieces."""

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

PIECE = 1 << 16  # about the number of bytes that are read and tokenized at once
# After so many bytes without white space, a piece ends between any two characters.
LONGEST = 1 << 20
_CUT = re.compile(rb".+(?:(?= \S)|(?<=\S)(?=\r?\n\S))", re.DOTALL)
Pieces = Iterator[tuple[str | None, str]]
"""Text in pieces: (name, text). The first piece of a document has its name, the others have None.

Bytes that are not UTF-8 are lone surrogates (errors="surrogateescape").
"""


class Corpus(NamedTuple):
    """The files of each split, and how to read them.

    Attributes:
      files: the files of each split.
      read: read(split, file) yields the text of a file in pieces, without a byte order mark.
      words: words(piece) counts the words of a piece. Default: separated by white space.
      characters: characters(piece) counts the characters of a piece. Default `len`.
      parts: (a, b, c) if all splits share their files: in each file 'valid' begins at a / c of the
        size and 'test' at b / c. Default None: each split has its own files.
      titled: whether the text of a document contains its name. Default False.
      verbatim: whether every byte of a file is read as it is. Default False.
      held_out: the share of 'valid', and of 'test', that `config.data.text.held_out` asks for;
        files are held out as a whole, so more may be. Default None: the splits are given.
    """

    files: dict[str, list[Path]]
    read: Callable[[str, Path], Pieces]
    words: Callable[[str], int] = lambda text: len(text.split())
    characters: Callable[[str], int] = len
    parts: tuple[int, int, int] | None = None
    titled: bool = False
    verbatim: bool = False
    held_out: float | None = None

    def size(self, split: str) -> int:
        """Adds up the sizes of a split's files on disk.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          The number of bytes. The text has another size if it is UTF-16 or UTF-32, since it becomes
          UTF-8.
        """
        size = 0
        for file in self.files[split]:
            with _opened(file) as (_, file_size):
                size += file_size
        if self.parts:
            first, last = _part(split, self.parts)
            size = size * (last - first) // self.parts[2]
        return size


def folders(root: Path, names: dict[str, list[str]], advice: str) -> dict[str, list[Path]]:
    """Lists the .txt files of each split.

    Args:
      root: the folder above the splits' folders.
      names: {split: names of its folders}; folders that do not exist are skipped.
      advice: where to get the corpus, for the error.

    Returns:
      {split: its files}, each folder in the order of `text_files`.

    Raises:
      FileNotFoundError: a split has no file.
    """
    files = {
        split: [file for folder in folders for file in text_files(root / folder)]
        for split, folders in names.items()
    }
    for split, of_split in files.items():
        if not of_split:
            raise FileNotFoundError(f"no .txt file in {root / names[split][0]}. {advice}")
    return files


def text_files(folder: Path) -> list[Path]:
    """Lists the .txt files of a folder, without hidden ones.

    Args:
      folder: the folder; it need not exist.

    Returns:
      The files. Names that are numbers come first, by value; the others follow by name.
    """
    files = [file for file in paths.visible(folder, "*.txt") if file.is_file()]
    number = lambda file: int(file.stem) if file.stem.isdecimal() else float("inf")
    return sorted(files, key=lambda file: (number(file), file.name))


def book(path: Path, name: str) -> Pieces:
    """Reads a file that is one document.

    Args:
      path: the file, UTF-8, or UTF-16 or UTF-32 with a byte order mark.
      name: the name of the document.

    Yields:
      The pieces.

    Raises:
      ValueError: the file begins as UTF-16 or UTF-32 and continues differently.
    """
    with path.open("rb") as file:
        stream, begin, end = as_utf8(file, path.stat().st_size, str(path))
        with stream:
            yield from _pieces(stream, begin, end, name)


def _part(split: str, parts: tuple[int, int, int]) -> tuple[int, int]:
    """Gives the range of a split in a file that all splits share, in units of 1 / parts[2]."""
    return dict(train=(0, parts[0]), valid=parts[:2], test=parts[1:])[split]


def parted(split: str, path: Path, parts: tuple[int, int, int], verbatim: bool) -> Pieces:
    """Reads the part of a split in a file that all splits share.

    Args:
      split: 'train', 'valid' or 'test'.
      path: the file, or a .zip that contains enwik8.
      parts: see `Corpus`.
      verbatim: whether cuts are at the exact byte. Otherwise they are at the next white space, and
        a byte order mark is dropped.

    Yields:
      The pieces of one document, which is named after the file and the split.

    Raises:
      ValueError: the .zip is damaged, or the file begins as UTF-16 or UTF-32 and continues
        differently.
    """
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
    """Opens a file, or the enwik8 inside a .zip: (stream, size)."""
    if path.suffix != ".zip":
        with path.open("rb") as file:
            yield file, path.stat().st_size
        return
    with contextlib.ExitStack() as held:
        file = held.enter_context(path.open("rb"))
        try:
            archive = held.enter_context(zipfile.ZipFile(file))
            member = held.enter_context(archive.open("enwik8"))
        except Exception as error:  # the errors for damaged and encrypted archives are undocumented
            raise _no_archive(path, error) from error
        try:
            yield member, archive.getinfo("enwik8").file_size
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _no_archive(path, error) from error


def _no_archive(path: Path, error: Exception) -> ValueError:
    """Makes the error of a .zip that cannot be read."""
    cure = "Fetch enwik8.zip again, from http://mattmahoney.net/dc/enwik8.zip"
    return ValueError(f"{path}: not an intact archive of a file enwik8 ({error}). {cure}")


def _between_words(stream: IO[bytes], place: int) -> int:
    """Finds the first white space from `place` on, or the first character if no space is near."""
    stream.seek(place)
    ahead = stream.read(PIECE)
    between = re.search(rb"\s", ahead) or re.search(rb"[^\x80-\xbf]", ahead)
    return place + between.start() if between else place


def _pieces(stream: IO[bytes], begin: int, end: int, name: str) -> Pieces:
    """Yields the text between two places. Pieces end before white space, where tokens end too."""
    stream.seek(begin)
    names, rest = iter([name]), b""
    while block := stream.read(min(end - begin, PIECE)):
        begin += len(block)
        # The search before the last three bytes was complete: no cut is in front of them.
        seen = max(0, len(rest) - 3)
        rest += block
        cut = _CUT.match(rest, seen)
        place = cut.end() if cut else _between_characters(rest) if len(rest) >= LONGEST else 0
        if begin < end and place:
            yield next(names, None), rest[:place].decode("utf-8", "surrogateescape")
            rest = rest[place:]
    if rest:
        yield next(names, None), rest.decode("utf-8", "surrogateescape")


def _between_characters(data: bytes) -> int:
    """Finds where the last UTF-8 character of `data` begins."""
    last_bytes = range(len(data) - 1, len(data) - 5, -1)
    return next((i for i in last_bytes if data[i] & 0xC0 != 0x80), len(data))
