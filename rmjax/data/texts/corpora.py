"""How the corpora of long documents lie on disk: which files each split has, and their text in pieces."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from absl import logging

from rmjax.data import records
from rmjax.data.source import hash64
from rmjax.io import paths
from rmjax.io.text import as_utf8, read_text

SPLITS = ("train", "valid", "test")
ADVICE = {
    "wikitext": "WikiText-2 and -103, raw or not, are zips (wikitext-103-raw-v1.zip and others) at "
    "https://wikitext.smerity.com. https://huggingface.co/datasets/Salesforce/wikitext has them as "
    "rows: write the rows of a split to a file as they are, since they have their line ends. Set "
    "data.dir to a folder of wiki.train.raw, wiki.valid.raw and wiki.test.raw, or of these names "
    "with .tokens.",
    "pg19": "PG-19 is described at https://github.com/google-deepmind/pg19. Its files are in the "
    "bucket gs://deepmind-gutenberg and at https://huggingface.co/datasets/deepmind/pg19. Set "
    "data.dir to the folder with train, validation, test and metadata.csv.",
    "enwik8": "enwik8.zip is at http://mattmahoney.net/dc/enwik8.zip, and the same text is at "
    "https://huggingface.co/datasets/LTCB/enwik8. Set data.dir to its folder, or to any one file.",
    "books": "Set data.dir to a .txt file, to a folder with a .txt of each book, or to a folder with "
    "folders train, valid and test of them.",
}
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


def wikitext(root: Path) -> Corpus:
    """wiki.{train,valid,test}.raw or, where they are not, .tokens; an end of line counts as a word, <eos>."""
    ends = {end: tuple(f"wiki.{split}.{end}" for split in SPLITS) for end in ("raw", "tokens")}
    try:
        files = records.find_files(str(root), ends["raw"], (".",), "")
    except FileNotFoundError:
        advice = f"Nor are all of those that end in .raw. {ADVICE['wikitext']}"
        files = records.find_files(str(root), ends["tokens"], (".",), advice)
    by_split = {split: [file] for split, file in zip(SPLITS, files, strict=True)}
    words = lambda text: len(text.split()) + text.count("\n")  # noqa: E731
    return Corpus(by_split, lambda _, file: _articles(file), words, titled=True)


def pg19(root: Path, train_share: float) -> Corpus:
    """Folders train, validation and test of <id>.txt, and metadata.csv for the titles."""
    files = _folders(root, dict(train=["train"], valid=["validation"], test=["test"]), ADVICE["pg19"])
    files["train"] = files["train"][: max(1, round(train_share * len(files["train"])))]
    titles = _titles(root / "metadata.csv")
    return Corpus(files, lambda _, file: _book(file, titles.get(file.stem, file.stem)))


def enwik8(root: Path, verbatim: bool) -> Corpus:
    """The file or its .zip; the splits have 18, 1 and 1 of 20 of its bytes. A character is a byte.

    With `verbatim` every byte is read as it stands, and cuts are exact. Without it the file is text:
    its byte order mark is dropped, and cuts are at the next white space.
    """
    path = next((path for path in (root, root / "enwik8", root / "enwik8.zip") if path.is_file()), None)
    if path is None:
        found = "has neither enwik8 nor enwik8.zip" if root.is_dir() else "no such file"
        raise FileNotFoundError(f"{root}: {found}. {ADVICE['enwik8']}")
    parts = (18, 19, 20)
    return Corpus(
        {split: [path] for split in SPLITS},
        lambda split, file: _parted(split, file, parts, verbatim),
        characters=lambda text: len(text.encode("utf-8", "surrogateescape")),
        parts=parts,
        verbatim=verbatim,
    )


def books(root: Path, held_out: float) -> Corpus:
    """Folders of .txt for each split; or one folder, whose held-out books a hash of names chooses.

    One file, or a folder of one or two, is cut by position instead.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder or file. {ADVICE['books']}")
    if (root / "train").is_dir():
        files = _folders(root, dict(train=["train"], valid=["valid", "validation"], test=["test"]), ADVICE["books"])
        return Corpus(files, lambda _, file: _book(file, file.stem))
    every = [root] if root.is_file() else _texts(root)
    if not every:
        raise FileNotFoundError(f"{root}: expected one .txt file or more, found none. {ADVICE['books']}")
    if len(every) < 3:
        million = 10**6
        parts = (round((1 - 2 * held_out) * million), round((1 - held_out) * million), million)
        logging.info(
            "%s: %s too few to hold out whole books. The last %.3g%% of each file is the test split, "
            "and as much before it is the validation split. Cuts are at white space.",
            root,
            "one file is" if len(every) == 1 else "two files are",
            100 * held_out,
        )
        return Corpus(dict.fromkeys(SPLITS, every), lambda split, file: _parted(split, file, parts, False), parts=parts)
    order = np.argsort(hash64("books", np.array([zlib.crc32(file.name.encode()) for file in every])), kind="stable")
    count = min(max(1, round(held_out * len(every))), (len(every) - 1) // 2)
    chosen = dict(train=order[2 * count :], valid=order[:count], test=order[count : 2 * count])
    files = {split: [every[i] for i in np.sort(places)] for split, places in chosen.items()}
    return Corpus(files, lambda _, file: _book(file, file.stem))


def _articles(path: Path) -> Pieces:
    """An article begins at a title between blank lines; those before the first are the first's."""
    name: str | None = path.name  # of text before any title
    held: list[str] = []
    size, some = 0, False  # of what is held; whether it is to be yielded, though it be short
    with path.open("rb") as file:
        stream, begin, _ = as_utf8(file, path.stat().st_size, str(path))
        stream.seek(begin)
        with io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="\n") as lines:
            line = lines.readline(LONGEST)
            begins, blank = True, True  # whether `line` begins a line; whether the line before is blank
            while line or not held:
                after = lines.readline(LONGEST)
                alone = begins and blank and not after.strip()
                title = re.fullmatch(r" = ([^=]|[^=].*[^=]) = \r?\n?", line) if alone else None
                full = size > LONGEST or (size > PIECE and re.match(r" \S", line))
                if some and (title or full):
                    yield name, "".join(held)
                    name, held, size = None, [], 0
                if title:
                    name = title[1]
                some = some or name is None or bool(line.strip())
                held.append(line)
                size += len(line)
                blank = not line.strip() and (begins or blank)
                begins, line = line.endswith("\n"), after
    yield name, "".join(held)


def _titles(path: Path) -> dict[str, str]:
    """{book id: title}, of no books where there is no such file."""
    titles: dict[str, str] = {}
    if not path.is_file():
        return titles
    text = read_text(path)
    rows = csv.reader(io.StringIO(text, newline=""))
    row: list[str] = []
    try:
        for row in rows:
            if len(row) != 4 and any(map(str.strip, row)):
                expected, row_text = "book id, title, date and address", ",".join(row)
                raise records.malformed(path, rows.line_num, "short_book_title", expected, row_text)
            if len(row) == 4:
                titles[row[0]] = row[1]
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}; fetch it again") from error
    if len(row) == 4 and not text.endswith("\n") and not row[3].strip().endswith(row[0]):
        cure = "the file is cut short, fetch it again"
        expected = f"a whole line, whose address ends in {row[0]}: {cure}"
        raise records.malformed(path, rows.line_num, "url", expected, row[3])
    return titles


def _folders(root: Path, names: dict[str, list[str]], advice: str) -> dict[str, list[Path]]:
    files = {split: [file for folder in folders for file in _texts(root / folder)] for split, folders in names.items()}
    for split, found in files.items():
        if not found:
            raise FileNotFoundError(f"no .txt file in {root / names[split][0]}. {advice}")
    return files


def _texts(folder: Path) -> list[Path]:
    """Numbers by their value, then names."""
    files = [file for file in paths.visible(folder, "*.txt") if file.is_file()]
    return sorted(files, key=lambda file: (int(file.stem) if file.stem.isdecimal() else float("inf"), file.name))


def _book(path: Path, name: str) -> Pieces:
    with path.open("rb") as file:
        stream, begin, end = as_utf8(file, path.stat().st_size, str(path))
        with stream:
            yield from _pieces(stream, begin, end, name)


def _part(split: str, parts: tuple[int, int, int]) -> tuple[int, int]:
    """Where a split begins and ends in a file that all of them share."""
    return dict(train=(0, parts[0]), valid=parts[:2], test=parts[1:])[split]


def _parted(split: str, path: Path, parts: tuple[int, int, int], verbatim: bool) -> Pieces:
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
        except Exception as error:  # what zipfile raises of a damaged or encrypted archive is not listed anywhere
            raise _no_archive(path, error) from error
        try:
            yield member, archive.getinfo("enwik8").file_size
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _no_archive(path, error) from error


def _no_archive(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: no whole archive of a file enwik8 ({error}). {ADVICE['enwik8']}")


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
    return next((i for i in range(len(data) - 1, len(data) - 5, -1) if data[i] & 0xC0 != 0x80), len(data))
