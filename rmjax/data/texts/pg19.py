"""PG-19 (Rae et al. 2020): books from before 1919."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.texts import corpora
from rmjax.data.texts.corpora import Corpus
from rmjax.data.texts.streams import Texts, TextSettings, open_texts
from rmjax.io.text import read_text
from rmjax.registry import between, setting

ADVICE = (
    "PG-19 is described at https://github.com/google-deepmind/pg19. Its files are in the "
    "bucket gs://deepmind-gutenberg and at https://huggingface.co/datasets/deepmind/pg19. Set "
    "data.dir to the folder with train, validation, test and metadata.csv."
)


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
    """The settings of all texts, and the share of the training books."""

    train_share: float = setting(
        0.07, between(1e-6, 1), "pg19: share of the training books that are read"
    )


def make(settings: Settings, common: ConfigDict, seed: int) -> Texts:
    """Opens the texts, see `Texts`."""
    read = lambda root: corpus(root, settings.train_share)
    return open_texts("pg19", read, ADVICE, settings, common)


def corpus(root: Path, train_share: float) -> Corpus:
    """Describes the corpus.

    Args:
      root: a folder with the folders train, validation and test of <id>.txt. metadata.csv has the
        titles; without it, ids name the books.
      train_share: share of the training books that are read, the first ones by id; at least one.

    Returns:
      The corpus.

    Raises:
      FileNotFoundError: a folder has no .txt file.
      ValueError: metadata.csv is malformed.
    """
    names = dict(train=["train"], valid=["validation"], test=["test"])
    files = corpora.folders(root, names, ADVICE)
    files["train"] = files["train"][: max(1, round(train_share * len(files["train"])))]
    titles = _titles(root / "metadata.csv")
    return Corpus(files, lambda _, file: corpora.book(file, titles.get(file.stem, file.stem)))


def _titles(path: Path) -> dict[str, str]:
    """Reads {book id: title}; empty if the file does not exist."""
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
        expected = f"a complete line, whose address ends in {row[0]}: {cure}"
        raise records.malformed(path, rows.line_num, "url", expected, row[3])
    return titles
