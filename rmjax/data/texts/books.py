"""Any books: text files of the user's own."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from rmjax.data.source import hash64
from rmjax.data.texts import corpora
from rmjax.data.texts.corpora import Corpus
from rmjax.data.texts.streams import Texts, TextSettings, open_texts
from rmjax.registry import inside, setting

ADVICE = (
    "Set data.dir to a .txt file, to a folder with a .txt of each book, or to a folder with "
    "folders train, valid and test of them."
)


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
    """Those of all texts, and how many books are held out."""

    held_out: float = setting(
        0.1, inside(0, 0.5), "books: share of them to validate on, and as many to test on"
    )


def make(settings: Any, common: Any, seed: int) -> Texts:
    return open_texts(
        "books", lambda root: corpus(root, settings.held_out), ADVICE, settings, common
    )


def corpus(root: Path, held_out: float) -> Corpus:
    """Folders of .txt for each split; or one folder, whose held-out books a hash of names chooses.

    One file, or a folder of one or two, is cut by position instead.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder or file. {ADVICE}")
    if (root / "train").is_dir():
        files = corpora.folders(
            root, dict(train=["train"], valid=["valid", "validation"], test=["test"]), ADVICE
        )
        return Corpus(files, lambda _, file: corpora.book(file, file.stem))
    every = [root] if root.is_file() else corpora.text_files(root)
    if not every:
        raise FileNotFoundError(f"{root}: expected one .txt file or more, found none. {ADVICE}")
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
        return Corpus(
            dict.fromkeys(corpora.SPLITS, every),
            lambda split, file: corpora.parted(split, file, parts, False),
            parts=parts,
        )
    order = np.argsort(
        hash64("books", np.array([zlib.crc32(file.name.encode()) for file in every])), kind="stable"
    )
    count = min(max(1, round(held_out * len(every))), (len(every) - 1) // 2)
    chosen = dict(train=order[2 * count :], valid=order[:count], test=order[count : 2 * count])
    files = {split: [every[i] for i in np.sort(places)] for split, places in chosen.items()}
    return Corpus(files, lambda _, file: corpora.book(file, file.stem))
