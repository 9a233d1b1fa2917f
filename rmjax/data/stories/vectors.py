"""Word vectors trained elsewhere (GloVe, word2vec, fastText), for the words of a vocabulary."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax.data.source import Description, Source
from rmjax.data.stories.text import fold
from rmjax.io import paths
from rmjax.io.progress import Progress
from rmjax.io.text import encoding_of

# float() would also accept 1_0 and white space.
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MOST = float(np.finfo(np.float32).max)
LONGEST = 1 << 20  # bytes of a line; a longer line is not a vector, and would be held in RAM


def word_vectors(config: ConfigDict, data: Source | Description) -> tuple[np.ndarray, np.ndarray]:
    """Reads the vectors of a source's items, which are words.

    Args:
      config: the section `data` of a config; its `vectors` is not empty.
      data: the source, or its description; only num_items and vocabulary are used.

    Returns:
      (vectors f32 [V, D] scaled to about unit length, mask [V] of the words that have a vector).

    Raises:
      FileNotFoundError: there is no file config.vectors.
      ValueError: the items are not words, or the file is wrong, see `read_vectors`.
      Stopped: the run was asked to stop.
    """
    if not data.num_items or not data.vocabulary:
        cause = f"the items of {config.name} are no words; leave it empty"
        raise ValueError(f"config.data.vectors = {config.vectors!r}: {cause}")
    return _word_vectors(config.vectors, tuple(data.vocabulary))


@functools.lru_cache(1)
def _word_vectors(path: str, vocabulary: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    vectors, known = read_vectors(path, vocabulary)
    length = np.sqrt(np.square(vectors).sum(1).mean(where=known)) if known.any() else 1.0
    return vectors / length, known


def read_vectors(path: str, vocabulary: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Reads the vectors of a vocabulary's words from a file.

    The file is text, or gzipped text (.gz), with lines `word v1 ... vD`. The first line may be
    word2vec's header, two integers: the number of words and D. Two words match if `text.fold` makes
    them equal. If several lines match a word, a line with exactly that word wins, then the first.
    Lines are read one by one, and only the vectors of the vocabulary are kept.

    Args:
      path: the file.
      vocabulary: V words by id.

    Returns:
      (vectors f32 [V, D], mask bool [V] of the words that have a vector). Other rows are zeros.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line has another width, or a value that is not a finite number; the file is
        empty, damaged, or not UTF-8; or no word of the vocabulary is in it.
      Stopped: the run was asked to stop.
    """
    file = paths.resolve(path, "config.data.vectors")
    if not file.is_file():
        raise FileNotFoundError(
            f"word vectors {path!r} not found: expected a text file of `word v1 ... vD` lines "
            "(.txt, or .gz of it), such as glove.6B.300d.txt of "
            "https://nlp.stanford.edu/projects/glove, also at "
            "https://huggingface.co/stanfordnlp/glove"
        )
    folded = {fold(word).encode(): index for index, word in reversed(list(enumerate(vocabulary)))}
    exact = {word.encode(): index for index, word in enumerate(vocabulary)}
    vectors, width = np.zeros((0, 0), np.float32), 0
    known, known_exactly = np.zeros(len(vocabulary), bool), np.zeros(len(vocabulary), bool)
    for number, line in _lines(file):
        if number == 1:
            width, is_header = _first_line(file, line)
            if is_header:
                continue
        word, _, values = line.partition(b" ")
        if line.count(b" ") != width:
            *_, last = line.rsplit(b" ", width)[0].split(b" ")
            if line.count(b" ") < width or _is_number(last):
                raise _malformed(file, number, f"a word and {width} numbers", line)
            continue  # GloVe 840B has a few "words" with spaces in them
        if not vectors.size:  # a header may claim any D, but this line has D numbers
            vectors = np.zeros((len(vocabulary), width), np.float32)
        index = exact.get(word)
        is_exact = index is not None
        if index is None:
            index = folded.get(fold(word.decode("utf-8", "replace")).encode())
        if index is not None and (not known[index] or is_exact > known_exactly[index]):
            if not all(map(_is_number, values.split(b" "))):
                raise _malformed(file, number, f"a word and {width} finite numbers", line)
            vectors[index], known[index], known_exactly[index] = values.split(), True, is_exact
    logging.info("%s: %d of %d words found.", file, known.sum(), len(vocabulary))
    if not known.any():
        some = ", ".join(map(repr, vocabulary[1:4]))
        raise ValueError(
            f"{file}: 0 of {len(vocabulary)} words found; the data have words such as {some}. Take "
            "a file of the same language, with words and not parts of words"
        )
    return vectors, known


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line without its end) of every line of a file, plain or gzipped."""
    reading = contextlib.closing(Progress(f"reading {file}", unit="lines", size=1))
    number, opened = 0, gzip.open if file.suffix == ".gz" else open
    with reading as progress, opened(file, "rb") as lines:
        try:
            for number, line in enumerate(iter(functools.partial(lines.readline, LONGEST), b""), 1):
                if number % 1024 == 0:
                    progress.to(number)
                line = line.rstrip()
                yield number, _without_mark(file, line) if number == 1 else line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            cause = f"not a whole .gz file ({error}); fetch it again"
            raise ValueError(f"{file}, after line {number}: {cause}") from error
    if not number:
        raise _malformed(file, 1, "a word and its vector", b"")


def _without_mark(file: Path, line: bytes) -> bytes:
    """The first line without a byte order mark."""
    encoding = encoding_of(line[:4])
    if not encoding.startswith("utf-8"):
        cure = "word vectors are read as UTF-8: save it as UTF-8"
        raise ValueError(f"{file}: is {encoding.upper()}, and {cure}")
    return line.removeprefix(codecs.BOM_UTF8)


def _first_line(file: Path, line: bytes) -> tuple[int, bool]:
    """(D, whether the line is a header), from the first line of a file."""
    fields = line.split()
    is_header = len(fields) == 2 and all(f.isdigit() and len(f) < 10 for f in fields)
    width = int(fields[1]) if is_header else len(fields) - 1
    if width < 1:
        raise _malformed(file, 1, "a word and its vector", line)
    return width, is_header


def _is_number(field: bytes) -> bool:
    return bool(_NUMBER.fullmatch(field)) and abs(float(field)) <= _MOST


def _malformed(file: Path, number: int, expected: str, line: bytes) -> ValueError:
    start = line[:60].decode("utf-8", "replace") + ("..." if len(line) > 60 else "")
    cause = f"expected {expected}, found {len(line.split())} fields: {start!r}"
    return ValueError(f"{file}, line {number}: {cause}")
