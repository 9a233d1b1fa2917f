"""Long documents for language models.

The tokens of each split are in one file, which is made once and read memory-mapped. The corpora are
WikiText (Merity et al. 2016), PG-19 (Rae et al. 2020), enwik8 (Hutter 2006), or a folder of books.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import logging

from rmjax.data import records
from rmjax.data.shares import log_splits, some, warn_of_shares
from rmjax.data.source import SPLITS
from rmjax.data.texts import corpora, tokenizers
from rmjax.io import atomic, paths
from rmjax.io.progress import Progress
from rmjax.io.text import replaced

_VERSION = 2  # raise it when the prepared files change


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a split, one after another.

    Attributes:
      tokens: unsigned [tokens], in the smallest type that holds the ids; memory-mapped.
      starts: i64 [documents], the first token of each document.
      names: the title of each document, or the name of the file.
      words: number of words between white space; a perplexity by word divides by it. In WikiText
        ends of lines count too.
      characters: number of characters; bytes for enwik8, as is usual there.
      tokenizer: made the tokens.
    """

    tokens: np.ndarray
    starts: np.ndarray
    names: list[str]
    words: int
    characters: int
    tokenizer: tokenizers.Tokenizer

    def document(self, index: int) -> np.ndarray:
        """Reads the tokens of one document.

        Args:
          index: the number of the document, from 0.

        Returns:
          unsigned [tokens of the document].
        """
        ends = np.append(self.starts[1:], len(self.tokens))
        return self.tokens[self.starts[index] : ends[index]]


def open_documents(
    name: str,
    corpus: Callable[[Path], corpora.Corpus],
    advice: str,
    directory: str,
    cache_dir: str,
    tokenizer: str = "bytes",
) -> dict[str, Documents]:
    """Opens the tokens of a corpus, and makes them if they do not exist.

    Text is read in pieces that are cut between words, so the corpus need not fit in RAM. The tokens
    are kept in `cache_dir`; they are written completely or not at all.

    Files are UTF-8, or UTF-16 and UTF-32 with a byte order mark, which tokenizers do not see. A
    warning counts bytes of other encodings: 'bytes' keeps them, other tokenizers see U+FFFD.

    Args:
      name: the name of the corpus, which is part of the prepared folder's name.
      corpus: corpus(path) describes the user's folder or file.
      advice: where to get the corpus, for errors.
      directory: the user's folder or file.
      cache_dir: the folder for prepared data; '' means `paths.cache('')`.
      tokenizer: see `make_tokenizer`.

    Returns:
      {split: its documents}, for 'train', 'valid' and 'test'.

    Raises:
      FileNotFoundError: `directory` lacks files, or the tokenizer does not exist.
      ValueError: a file has no text, or has NUL characters although tokens are not bytes;
        metadata.csv is malformed; a .zip is damaged; the tokenizer.json is not one.
      OSError: nothing can be written in `cache_dir`.
      Stopped: the run was asked to stop.
    """
    if not directory:
        raise FileNotFoundError(f"{name}: data.dir is empty. {advice}")
    read = corpus(paths.resolve(directory, "config.data.dir"))
    names = {split: [file.name for file in files] for split, files in read.files.items()}
    parameters = dict(version=_VERSION, kind=name, files=names, parts=read.parts)
    parameters |= dict(tokenizer=tokenizers.identity(tokenizer))
    files = tuple(file for split in SPLITS for file in read.files[split])
    digest = records.StreamConfig(name="", files=files, parameters=parameters).name
    prepared = paths.cache(cache_dir) / "documents" / f"{name}-{digest}"
    if not prepared.exists():
        logging.info("Preparing documents, once, from %s in %s", directory, prepared)
        _prepare(prepared, read, tokenizer)
    splits = _open(prepared, tokenizer)
    _report(name, read, names, {split: len(splits[split].tokens) for split in SPLITS})
    return splits


def _report(
    name: str, corpus: corpora.Corpus, files: dict[str, list[str]], sizes: dict[str, int]
) -> None:
    """Logs the sizes and the files of the splits, and warns where much is held out."""
    if corpus.parts:
        log_splits(f"{name}, parts of {some(files['train'])}", sizes, "tokens")
        return
    log_splits(name, sizes, "tokens", files)
    if corpus.held_out is not None:
        asked = dict.fromkeys(SPLITS[1:], corpus.held_out)
        cure = "complete files are held out. Add texts, or join them into one, which is cut"
        warn_of_shares(name, sizes, asked, "config.data.text.held_out", cure)


def _prepare(prepared: Path, corpus: corpora.Corpus, tokenizer: str) -> None:
    """Writes to another folder and renames it. The first of several processes to finish wins."""
    made = tokenizers.make_tokenizer(tokenizer, _training(corpus))
    with atomic.folder(prepared.parent) as scratch:
        folder = scratch / prepared.name
        folder.mkdir()
        dtype = np.min_scalar_type(made.size - 1)
        progress = Progress("making tokens", sum(map(corpus.size, SPLITS)))
        splits = {split: _write(folder, split, corpus, made, dtype, progress) for split in SPLITS}
        progress.close()
        described = dict(tokenizer=made.state, dtype=dtype.name, splits=splits)
        (folder / "tokens.json").write_text(json.dumps(described))
        try:
            folder.rename(prepared)
        except OSError:
            if not prepared.exists():
                raise


def _training(corpus: corpora.Corpus) -> Iterator[str]:
    """Yields the training texts, for a vocabulary."""
    progress = Progress("reading the training texts for a vocabulary", corpus.size("train"))
    for file in corpus.files["train"]:
        for _, piece in corpus.read("train", file):
            progress.step(len(piece.encode("utf-8", "surrogateescape")))
            yield _as_text(file, piece)[0]
    progress.close()


def _as_text(file: Path, piece: str) -> tuple[str, int]:
    """Replaces bytes that are not UTF-8: (piece, number of replaced bytes)."""
    if "\0" in piece:
        raise ValueError(
            f"{file}: has NUL characters, as UTF-16 without a byte order mark has: save it as "
            "UTF-8. A file that is not text needs config.data.text.tokenizer='bytes'"
        )
    return replaced(piece)


def _write(
    folder: Path,
    split: str,
    corpus: corpora.Corpus,
    tokenizer: tokenizers.Tokenizer,
    dtype: np.dtype,
    progress: Progress,
) -> dict[str, object]:
    """Writes the tokens of a split. Returns the other fields of `Documents`, as JSON."""
    starts: list[int] = []
    names: list[str] = []
    tokens, words, characters = 0, 0, 0
    of_bytes = isinstance(tokenizer, tokenizers.Bytes)
    with (folder / f"{split}.tokens").open("wb") as out:
        for file in corpus.files[split]:
            before, wrong, last = tokens, 0, ""
            for name, piece in corpus.read(split, file):
                if name is not None:
                    starts.append(tokens)
                    names.append(replaced(name)[0])  # so that it can be printed
                    last = ""
                text, more = replaced(piece) if of_bytes else _as_text(file, piece)
                ids = tokenizer.encode(piece if of_bytes else text)
                out.write(ids.astype(dtype).tobytes())
                wrong += more
                tokens += len(ids)
                # A word too long for one piece continues in the next one, and counts once.
                edge, last = last + piece[:1], piece[-1:]
                words += corpus.words(piece) - (len(edge) == 2 and edge.split() == [edge])
                characters += corpus.characters(piece)
                progress.step(len(piece.encode("utf-8", "surrogateescape")))
            if tokens == before:
                cure = "fetch the file again, or remove it"
                raise ValueError(f"{file}: expected text for {split!r}, found none; {cure}")
            if wrong and not corpus.verbatim:
                kept = "kept as they are" if of_bytes else "replaced"
                message = "%s: %d bytes are not UTF-8, and were %s: save the file as UTF-8."
                logging.warning(message, file, wrong, kept)
            if corpus.titled and names == [file.name]:
                message = (
                    "%s: no title was found (a line ' = Title = ' between two blank lines), so the "
                    "file is one document. Join rows of a data set with their line ends unchanged."
                )
                logging.warning(message, file)
    np.save(folder / f"{split}.starts.npy", np.array(starts, np.int64))
    return dict(names=names, tokens=tokens, words=words, characters=characters)


def _open(prepared: Path, tokenizer: str) -> dict[str, Documents]:
    """Opens what `_prepare` wrote."""
    described = json.loads((prepared / "tokens.json").read_text())
    restored = tokenizers.restore(tokenizer, described["tokenizer"])
    splits = {}
    for split, fields in described["splits"].items():
        path, shape = prepared / f"{split}.tokens", (fields.pop("tokens"),)
        tokens = np.memmap(path, described["dtype"], "r", shape=shape)
        starts = np.load(prepared / f"{split}.starts.npy")
        splits[split] = Documents(tokens, starts, tokenizer=restored, **fields)
    return splits
