"""Long documents for language models: the tokens of each split in one file, made once and read memory-mapped.

WikiText (Merity et al. 2016), PG-19 (Rae et al. 2020), enwik8 (Hutter 2006), or a folder of books.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from rmjax.data import records
from rmjax.data.texts import corpora, tokenizers
from rmjax.io import atomic, paths
from rmjax.io.progress import Progress
from rmjax.io.text import replaced

_VERSION = 2  # of what is written; a change of it raises it


@dataclasses.dataclass(frozen=True)
class Documents:
    """A split, its documents one after another."""

    tokens: np.ndarray  # unsigned [tokens], the smallest type that holds the ids, memory-mapped
    starts: np.ndarray  # i64 [documents], where each begins
    names: list[str]  # of each: its title, or its file's name
    words: int  # between white space and, of WikiText, ends of lines: what a perplexity by word divides by
    characters: int  # of enwik8, as is usual there, bytes
    tokenizer: tokenizers.Tokenizer

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document."""
        ends = np.append(self.starts[1:], len(self.tokens))
        return self.tokens[self.starts[index] : ends[index]]


def documents(
    name: str,
    corpus: Callable[[Path], corpora.Corpus],
    advice: str,
    directory: str,
    cache_dir: str,
    tokenizer: str = "bytes",
) -> dict[str, Documents]:
    """The documents of each split, as tokens.

    Text is read in pieces, cut between words, so that no corpus need fit in RAM. Its tokens are kept in `cache_dir`,
    written whole or not at all.

    Files are UTF-8, or UTF-16 and UTF-32 with a byte order mark. No tokenizer sees the mark. A warning counts bytes of
    other encodings: 'bytes' keeps them, other tokenizers see U+FFFD.

    Args:
      name: of the corpus; prepared files go by it.
      corpus: the folder or file of the user -> which files each split has.
      advice: where the corpus is to be had, for errors.
      directory: the folder or file of the user.
      cache_dir: where tokens go; '' is `paths.cache`.
      tokenizer: as `make_tokenizer` takes it.

    Returns:
      'train', 'valid' and 'test'.

    Raises:
      FileNotFoundError: `directory` has not the files, or there is no such tokenizer.
      ValueError: a file without text, or with NUL characters where tokens are not bytes; a malformed metadata.csv; a
        damaged .zip; no tokenizer.json.
      OSError: nothing can be written in `cache_dir`.
      Stopped: the run was asked to stop.
    """
    if not directory:
        raise FileNotFoundError(f"{name}: data.dir is empty. {advice}")
    read = corpus(paths.resolve(directory, "config.data.dir"))
    names = {split: [file.name for file in files] for split, files in read.files.items()}
    parameters = dict(
        version=_VERSION, kind=name, files=names, tokenizer=tokenizers.identity(tokenizer)
    )
    parameters |= dict(parts=read.parts)
    files = tuple(file for split in corpora.SPLITS for file in read.files[split])
    digest = records.StreamConfig(name="", files=files, parameters=parameters).name
    prepared = paths.cache(cache_dir) / "documents" / f"{name}-{digest}"
    if not prepared.exists():
        logging.info("Preparing documents, once, from %s in %s", directory, prepared)
        _prepare(prepared, read, tokenizer)
    return _open(prepared, tokenizer)


def _prepare(prepared: Path, corpus: corpora.Corpus, tokenizer: str) -> None:
    """Writes to another directory and renames it at the end; of several processes the first to end wins."""
    made = tokenizers.make_tokenizer(tokenizer, _training(corpus))
    with atomic.folder(prepared.parent) as scratch:
        folder = scratch / prepared.name
        folder.mkdir()
        dtype = np.min_scalar_type(made.size - 1)
        progress = Progress("making tokens", sum(map(corpus.size, corpora.SPLITS)))
        splits = {
            split: _write(folder, split, corpus, made, dtype, progress) for split in corpora.SPLITS
        }
        (folder / "tokens.json").write_text(
            json.dumps(dict(tokenizer=made.state, dtype=dtype.name, splits=splits))
        )
        try:
            folder.rename(prepared)
        except OSError:
            if not prepared.exists():
                raise


def _training(corpus: corpora.Corpus) -> Iterator[str]:
    """The training texts, for a vocabulary."""
    progress = Progress("reading the training texts for a vocabulary", corpus.size("train"))
    for file in corpus.files["train"]:
        for _, piece in corpus.read("train", file):
            progress.step(len(piece.encode("utf-8", "surrogateescape")))
            yield _as_text(file, piece)[0]


def _as_text(file: Path, piece: str) -> tuple[str, int]:
    """A piece for a tokenizer of text, and how many of its bytes are not UTF-8."""
    if "\0" in piece:
        raise ValueError(
            f"{file}: has NUL characters, as text in UTF-16 without a byte order mark has: save it "
            "as UTF-8. A file that is no text needs config.data.text.tokenizer='bytes'"
        )
    return replaced(piece)


def _write(
    folder: Path,
    split: str,
    corpus: corpora.Corpus,
    tokenizer: tokenizers.Tokenizer,
    dtype: np.dtype,
    progress: Progress,
) -> dict[str, Any]:
    starts, names, tokens, words, characters = [], [], 0, 0, 0
    of_bytes = isinstance(tokenizer, tokenizers.Bytes)
    with (folder / f"{split}.tokens").open("wb") as out:
        for file in corpus.files[split]:
            before, wrong, last = tokens, 0, ""
            for name, piece in corpus.read(split, file):
                if name is not None:
                    starts.append(tokens)
                    names.append(replaced(name)[0])  # it can be printed
                    last = ""
                text, more = replaced(piece) if of_bytes else _as_text(file, piece)
                ids = tokenizer.encode(piece if of_bytes else text)
                out.write(ids.astype(dtype).tobytes())
                wrong += more
                tokens += len(ids)
                edge, last = (
                    last + piece[:1],
                    piece[-1:],
                )  # a word too long for one piece goes on in the next
                words += corpus.words(piece) - (len(edge) == 2 and edge.split() == [edge])
                characters += corpus.characters(piece)
                progress.step(len(piece.encode("utf-8", "surrogateescape")))
            if tokens == before:
                raise ValueError(
                    f"{file}: expected text for {split!r}, found none; fetch it again, or remove it"
                )
            if wrong and not corpus.verbatim:
                kept = "kept as they are" if of_bytes else "replaced"
                message = "%s: %d bytes are not UTF-8, and were %s: save the file as UTF-8."
                logging.warning(message, file, wrong, kept)
            if corpus.titled and names == [file.name]:
                logging.warning(
                    "%s: no title was found (a line ' = Title = ' between two blank lines), so all of it "
                    "is one document. Join rows of a data set as they are, with their line ends.",
                    file,
                )
    np.save(folder / f"{split}.starts.npy", np.array(starts, np.int64))
    return dict(names=names, tokens=tokens, words=words, characters=characters)


def _open(prepared: Path, tokenizer: str) -> dict[str, Documents]:
    described = json.loads((prepared / "tokens.json").read_text())
    restored = tokenizers.restore(tokenizer, described["tokenizer"])
    return {
        split: Documents(
            tokens=np.memmap(
                prepared / f"{split}.tokens", described["dtype"], "r", shape=(counts.pop("tokens"),)
            ),
            starts=np.load(prepared / f"{split}.starts.npy"),
            tokenizer=restored,
            **counts,
        )
        for split, counts in described["splits"].items()
    }
