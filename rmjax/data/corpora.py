"""How the corpora of long documents lie on disk: which files each split has, and their text in pieces."""

from __future__ import annotations

import csv
import itertools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from rmjax.data import records
from rmjax.data.source import hash64

SPLITS = ("train", "valid", "test")
ADVICE = {
    "wikitext": "WikiText-2 and -103, raw or not, are at https://www.salesforce.com/products/einstein/ai-research/"
    "the-wikitext-dependency-language-modeling-dataset; set data.dir to the folder of the three files, named so.",
    "pg19": "PG-19 is described at https://github.com/google-deepmind/pg19; set data.dir to the folder of all of it.",
    "enwik8": "It is http://mattmahoney.net/dc/enwik8.zip; set data.dir to its folder, or to any one file.",
    "books": "Set data.dir to a folder with a .txt of each book, or with folders train, valid and test of them.",
}
PIECE = 1 << 16  # about as many bytes are read, and made tokens, at once
Pieces = Iterator[tuple[str | None, str]]
"""Text in pieces: with the first of a document comes its name, with its others None. Bytes that are not UTF-8 are lone
surrogates (errors="surrogateescape")."""


class Corpus(NamedTuple):
    files: dict[str, list[Path]]  # of each split
    read: Callable[[str, Path], Pieces]  # (split, one of its files)
    words: Callable[[str], int] = lambda text: len(text.split())
    characters: Callable[[str], int] = len


def wikitext(root: Path) -> Corpus:
    """wiki.{train,valid,test}.raw or, where they are not, .tokens; an end of line counts as a word, <eos>."""
    ends = {end: tuple(f"wiki.{split}.{end}" for split in SPLITS) for end in ("raw", "tokens")}
    try:
        files = records.find_files(str(root), ends["raw"], (".",), "")
    except FileNotFoundError:
        advice = f"Nor are all of those that end in .raw. {ADVICE['wikitext']}"
        files = records.find_files(str(root), ends["tokens"], (".",), advice)
    by_split = {split: [file] for split, file in zip(SPLITS, files, strict=True)}
    return Corpus(by_split, lambda _, file: _articles(file), words=lambda text: len(text.split()) + text.count("\n"))


def pg19(root: Path, train_share: float) -> Corpus:
    """Folders train, validation and test of <id>.txt, and metadata.csv for the titles."""
    files = _folders(root, dict(train=["train"], valid=["validation"], test=["test"]), ADVICE["pg19"])
    files["train"] = files["train"][: max(1, round(train_share * len(files["train"])))]
    titles = _titles(root / "metadata.csv")
    return Corpus(files, lambda _, file: _book(file, titles.get(file.stem, file.stem)))


def enwik8(root: Path) -> Corpus:
    """The file or its .zip; 18, 1 and 1 of 20 of its bytes. A character is a byte, as is usual there."""
    path = next((path for path in (root, root / "enwik8", root / "enwik8.zip") if path.is_file()), None)
    if path is None:
        found = "has neither enwik8 nor enwik8.zip" if root.is_dir() else "no such file"
        raise FileNotFoundError(f"{root}: {found}. {ADVICE['enwik8']}")
    files = {split: [path] for split in SPLITS}
    return Corpus(files, _twentieths, characters=lambda text: len(text.encode("utf-8", "surrogateescape")))


def books(root: Path, held_out: float) -> Corpus:
    """Folders of .txt for each split, or one folder, of which whole books are held out by a hash of their names."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder. {ADVICE['books']}")
    if (root / "train").is_dir():
        files = _folders(root, dict(train=["train"], valid=["valid", "validation"], test=["test"]), ADVICE["books"])
        return Corpus(files, lambda _, file: _book(file, file.stem))
    every = _texts(root)
    if len(every) < 3:
        message = f"{root}: expected 3 .txt files or more, one for each split, found {len(every)}. {ADVICE['books']}"
        raise ValueError(message) if every else FileNotFoundError(message)
    order = np.argsort(hash64("books", np.array([zlib.crc32(file.name.encode()) for file in every])), kind="stable")
    count = min(max(1, round(held_out * len(every))), (len(every) - 1) // 2)
    chosen = dict(train=order[2 * count :], valid=order[:count], test=order[count : 2 * count])
    files = {split: [every[i] for i in np.sort(places)] for split, places in chosen.items()}
    return Corpus(files, lambda _, file: _book(file, file.stem))


def _articles(path: Path) -> Pieces:
    """An article begins at a title between blank lines; those before the first are the first's."""
    name: str | None = path.name  # of text before any title
    held: list[str] = []
    size = 0
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        before, line = "", next(lines, "")
        for after in itertools.chain(lines, [""]):
            blank = not before.strip() and not after.strip()
            title = re.fullmatch(r" = ([^=]|[^=].*[^=]) = \r?\n?", line) if blank else None
            some = name is None or any(map(str.strip, held))
            if some and (title or (size > PIECE and re.match(r" \S", line))):
                yield name, "".join(held)
                name, held, size = None, [], 0
            if title:
                name = title[1]
            held.append(line)
            size += len(line)
            before, line = line, after
    yield name, "".join(held)


def _titles(path: Path) -> dict[str, str]:
    """{book id: title}, of no books where there is no such file."""
    titles = {}
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as lines:
            rows = csv.reader(lines)
            for row in rows:
                if len(row) != 4:
                    expected, found = "book id, title, date and address", ",".join(row)
                    raise records.malformed(path, rows.line_num, "short_book_title", expected, found)
                titles[row[0]] = row[1]
    return titles


def _folders(root: Path, names: dict[str, list[str]], advice: str) -> dict[str, list[Path]]:
    files = {split: [file for folder in folders for file in _texts(root / folder)] for split, folders in names.items()}
    for split, found in files.items():
        if not found:
            raise FileNotFoundError(f"no .txt file in {root / names[split][0]}. {advice}")
    return files


def _texts(folder: Path) -> list[Path]:
    """Numbers by their value, then names."""
    files = [file for file in folder.glob("*.txt") if file.is_file()]
    return sorted(files, key=lambda file: (int(file.stem) if file.stem.isdecimal() else float("inf"), file.name))


def _book(path: Path, name: str) -> Pieces:
    with path.open("rb") as stream:
        yield from _pieces(stream, path.stat().st_size, name)


def _twentieths(split: str, path: Path) -> Pieces:
    first, last = {"train": (0, 18), "valid": (18, 19), "test": (19, 20)}[split]

    def part(stream: IO[bytes], size: int) -> Pieces:
        stream.seek(size * first // 20)
        return _pieces(stream, size * last // 20 - size * first // 20, f"{path.stem} {split}")

    if path.suffix != ".zip":
        with path.open("rb") as file:
            yield from part(file, path.stat().st_size)
        return
    try:
        with zipfile.ZipFile(path) as archive, archive.open("enwik8") as member:
            yield from part(member, archive.getinfo("enwik8").file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"{path}: no whole archive of a file enwik8 ({error}). {ADVICE['enwik8']}") from error


def _pieces(stream: IO[bytes], count: int, name: str) -> Pieces:
    """The next `count` bytes. A piece ends before the white space between two words, where tokenizers cut too."""
    names, rest = iter([name]), b""
    while block := stream.read(min(count, PIECE)):
        count -= len(block)
        rest += block
        whole = re.match(rb".+(?:(?= \S)|(?<=\S)(?=\n\S))", rest, re.DOTALL)
        if count and whole:
            yield next(names, None), whole[0].decode("utf-8", "surrogateescape")
            rest = rest[whole.end() :]
    if rest:
        yield next(names, None), rest.decode("utf-8", "surrogateescape")
