"""WikiText-2 and WikiText-103 (Merity et al. 2016). A document is an article and its title."""

from __future__ import annotations

import io
import re
from pathlib import Path

from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.source import SPLITS
from rmjax.data.texts import corpora
from rmjax.data.texts.corpora import Corpus, Pieces
from rmjax.data.texts.streams import Texts, TextSettings, open_texts
from rmjax.io.text import as_utf8

ADVICE = (
    "WikiText-2 and -103, raw or not, are zips (wikitext-103-raw-v1.zip and others) at "
    "https://wikitext.smerity.com. https://huggingface.co/datasets/Salesforce/wikitext has them as "
    "rows: write the rows of a split to a file unchanged, since they include their line ends. Set "
    "data.dir to a folder of wiki.train.raw, wiki.valid.raw and wiki.test.raw, or of the same "
    "names with .tokens in place of .raw."
)

Settings = TextSettings


def make(settings: TextSettings, common: ConfigDict, seed: int) -> Texts:
    """Opens the texts, see `Texts`."""
    return open_texts("wikitext", corpus, ADVICE, settings, common)


def corpus(root: Path) -> Corpus:
    """Describes the corpus. An end of line counts as a word, <eos>.

    Args:
      root: a folder with wiki.{train,valid,test}.raw, or with the same names ending in .tokens.
        If both exist, the .raw files are read.

    Returns:
      The corpus.

    Raises:
      FileNotFoundError: `root` lacks files of both endings.
    """
    raw, tokens = (tuple(f"wiki.{split}.{end}" for split in SPLITS) for end in ("raw", "tokens"))
    try:
        files = records.find_files(str(root), raw, (".",), "")
    except FileNotFoundError:
        advice = f"The files that end in .raw are not complete either. {ADVICE}"
        files = records.find_files(str(root), tokens, (".",), advice)
    by_split = {split: [file] for split, file in zip(SPLITS, files, strict=True)}
    words = lambda text: len(text.split()) + text.count("\n")
    return Corpus(by_split, lambda _, file: _articles(file), words, titled=True)


def _articles(path: Path) -> Pieces:
    """Yields the articles in pieces.

    An article begins at a title between blank lines. Blank lines before the first title belong to
    the first article.
    """
    name: str | None = path.name  # names the text before any title
    held: list[str] = []  # lines that were not yielded yet
    size, some = 0, False  # characters of `held`; whether `held` is more than leading blank lines
    with path.open("rb") as file:
        stream, begin, _ = as_utf8(file, path.stat().st_size, str(path))
        stream.seek(begin)
        with io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="\n") as lines:
            line = lines.readline(corpora.LONGEST)
            begins = True  # whether `line` is the start of a line
            blank = True  # whether the line before is blank
            while line or not held:
                after = lines.readline(corpora.LONGEST)
                alone = begins and blank and not after.strip()
                title = re.fullmatch(r" = ([^=]|[^=].*[^=]) = \r?\n?", line) if alone else None
                full = size > corpora.LONGEST or (size > corpora.PIECE and re.match(r" \S", line))
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
