"""Books: the user's own text files."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax.data.source import SPLITS, hash64
from rmjax.data.texts import corpora
from rmjax.data.texts.corpora import Corpus
from rmjax.data.texts.streams import Texts, TextSettings, open_texts
from rmjax.registry import inside, setting

ADVICE = (
    "Set data.dir to a .txt file, to a folder with one .txt file for each book, or to a folder "
    "with the folders train, valid and test of such files."
)


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
    """The settings of all texts, and the share of held-out books."""

    held_out: float = setting(
        0.1, inside(0, 0.5), "books: share for the validation split, and again for the test split"
    )


def make(settings: Settings, common: ConfigDict, seed: int) -> Texts:
    """Opens the texts, see `Texts`."""
    read = lambda root: corpus(root, settings.held_out)
    return open_texts("books", read, ADVICE, settings, common)


def corpus(root: Path, held_out: float) -> Corpus:
    """Describes the corpus.

    Args:
      root: a folder with the folders train, valid (or validation) and test of .txt files. Or one
        folder of .txt files, from which a hash of the names chooses the held-out books. Or one
        file; one or two files are cut by position, and each split gets a part of each.
      held_out: share of the books (or of each file) for 'valid', and again for 'test'.

    Returns:
      The corpus.

    Raises:
      FileNotFoundError: `root` does not exist, or a folder has no .txt file.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder or file. {ADVICE}")
    if (root / "train").is_dir():
        names = dict(train=["train"], valid=["valid", "validation"], test=["test"])
        files = corpora.folders(root, names, ADVICE)
        return Corpus(files, lambda _, file: corpora.book(file, file.stem))
    every = [root] if root.is_file() else corpora.text_files(root)
    if not every:
        raise FileNotFoundError(f"{root}: expected at least one .txt file, found none. {ADVICE}")
    if len(every) < 3:
        million = 10**6
        parts = (round((1 - 2 * held_out) * million), round((1 - held_out) * million), million)
        too_few = "one file is" if len(every) == 1 else "two files are"
        message = (
            "%s: %s too few to hold out complete books. The last %.3g%% of each file is the test "
            "split, and the same share before it is the validation split. Cuts are at white space."
        )
        logging.info(message, root, too_few, 100 * held_out)
        read = lambda split, file: corpora.parted(split, file, parts, False)
        return Corpus(dict.fromkeys(SPLITS, every), read, parts=parts)
    names_as_numbers = np.array([zlib.crc32(file.name.encode()) for file in every])
    order = np.argsort(hash64("books", names_as_numbers), kind="stable")
    count = min(max(1, round(held_out * len(every))), (len(every) - 1) // 2)
    chosen = dict(train=order[2 * count :], valid=order[:count], test=order[count : 2 * count])
    files = {split: [every[i] for i in np.sort(places)] for split, places in chosen.items()}
    return Corpus(files, lambda _, file: corpora.book(file, file.stem), held_out=held_out)
