"""enwik8 (Hutter 2006): the first 10^8 bytes of a dump of Wikipedia."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmjax.data.texts import corpora
from rmjax.data.texts.corpora import Corpus
from rmjax.data.texts.streams import Texts, TextSettings, open_texts

ADVICE = (
    "enwik8.zip is at http://mattmahoney.net/dc/enwik8.zip, and the same text is at "
    "https://huggingface.co/datasets/LTCB/enwik8. Set data.dir to its folder, or to any one file."
)

Settings = TextSettings


def make(settings: Any, common: Any, seed: int) -> Texts:
    return open_texts(
        "enwik8", lambda root: corpus(root, settings.tokenizer == "bytes"), ADVICE, settings, common
    )


def corpus(root: Path, verbatim: bool) -> Corpus:
    """The file or its .zip; the splits have 18, 1 and 1 of 20 of its bytes. A character is a byte.

    With `verbatim` every byte is read as it stands, and cuts are exact. Without it the file is text:
    its byte order mark is dropped, and cuts are at the next white space.
    """
    path = next(
        (path for path in (root, root / "enwik8", root / "enwik8.zip") if path.is_file()), None
    )
    if path is None:
        found = "has neither enwik8 nor enwik8.zip" if root.is_dir() else "no such file"
        raise FileNotFoundError(f"{root}: {found}. {ADVICE}")
    parts = (18, 19, 20)
    return Corpus(
        {split: [path] for split in corpora.SPLITS},
        lambda split, file: corpora.parted(split, file, parts, verbatim),
        characters=lambda text: len(text.encode("utf-8", "surrogateescape")),
        parts=parts,
        verbatim=verbatim,
    )
