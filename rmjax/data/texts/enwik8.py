"""enwik8 (Hutter 2006): the first 10^8 bytes of a Wikipedia dump."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from rmjax.data.source import SPLITS
from rmjax.data.texts import corpora
from rmjax.data.texts.corpora import Corpus
from rmjax.data.texts.streams import Texts, TextSettings, open_texts

ADVICE = (
    "enwik8.zip is at http://mattmahoney.net/dc/enwik8.zip. The same text is at "
    "https://huggingface.co/datasets/LTCB/enwik8. Set data.dir to the folder of the file, or to "
    "any single file."
)

Settings = TextSettings


def make(settings: TextSettings, common: ConfigDict, seed: int) -> Texts:
    """Opens the texts, see `Texts`."""
    read = lambda root: corpus(root, settings.tokenizer == "bytes")
    return open_texts("enwik8", read, ADVICE, settings, common)


def corpus(root: Path, verbatim: bool) -> Corpus:
    """Describes the corpus: the splits are 18/20, 1/20 and 1/20 of the bytes.

    Characters are counted as bytes.

    Args:
      root: the file, the .zip, or the folder of one of them.
      verbatim: whether every byte is read as it is, with cuts at the exact byte. Otherwise the file
        is text: a byte order mark is dropped, and cuts are at the next white space.

    Returns:
      The corpus.

    Raises:
      FileNotFoundError: `root` does not exist, or has no such file.
    """
    places = (root, root / "enwik8", root / "enwik8.zip")
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        cause = "has neither enwik8 nor enwik8.zip" if root.is_dir() else "no such file"
        raise FileNotFoundError(f"{root}: {cause}. {ADVICE}")
    parts = (18, 19, 20)
    return Corpus(
        {split: [path] for split in SPLITS},
        lambda split, file: corpora.parted(split, file, parts, verbatim),
        characters=lambda text: len(text.encode("utf-8", "surrogateescape")),
        parts=parts,
        verbatim=verbatim,
    )
