"""Word vectors trained elsewhere (GloVe, word2vec, fastText), of the words of a vocabulary."""

from __future__ import annotations

import codecs
import functools
import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from rmjax.data.stories.text import fold
from rmjax.io import paths
from rmjax.io.progress import Progress
from rmjax.io.text import encoding_of

_NUMBER = re.compile(
    rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
)  # float() takes 1_0 and white space too
_MOST = float(np.finfo(np.float32).max)
LONGEST = 1 << 20  # bytes of a line: more is no vector, and would be held in RAM


def word_vectors(config: Any, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that the item features of some data begin with.

    Args:
      config: the section `data` of a config; its `vectors` are not empty.
      data: has num_items and vocabulary, as a `Source` or a `Description`.

    Returns:
      (rows of about unit length f32 [V, D], which words have one [V]) of config.vectors.

    Raises:
      ValueError: the items are no words; or as `read_vectors`.
    """
    if not data.num_items or not data.vocabulary:
        raise ValueError(
            f"config.data.vectors = {config.vectors!r}: the items of {config.name} are no words"
        )
    return _word_vectors(config.vectors, tuple(data.vocabulary))


@functools.lru_cache(1)
def _word_vectors(path: str, vocabulary: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    vectors, found = read_vectors(path, vocabulary)
    length = np.sqrt(np.square(vectors).sum(1).mean(where=found)) if found.any() else 1.0
    return vectors / length, found


def read_vectors(path: str, vocabulary: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(vectors f32 [V, D], found bool [V]) of the words of `vocabulary`, by id; where found is false there are zeros.

    The file is text, or text in .gz: `word v1 ... vD` a line. A first line of two integers is
    word2vec's header, how many words and D. Words match if `text.fold` makes them equal. If several
    lines match a word, a line with exactly that word wins, then the first. Lines are read one by
    one, and only what is asked for is kept.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line of another width or with a value that is no finite number; an empty file, a
        damaged .gz, one that is not UTF-8; no word of the vocabulary is in it.
      Stopped: the run was asked to stop.
    """
    file = paths.resolve(path, "config.data.vectors")
    if not file.is_file():
        raise FileNotFoundError(
            f"word vectors {path!r} not found: expected a text file of `word v1 ... vD` lines (.txt, or .gz of it), "
            "such as glove.6B.300d.txt of https://nlp.stanford.edu/projects/glove, also at "
            "https://huggingface.co/stanfordnlp/glove"
        )
    wanted = {fold(word).encode(): index for index, word in reversed(list(enumerate(vocabulary)))}
    exact = {word.encode(): index for index, word in enumerate(vocabulary)}
    vectors, number, width = np.zeros((0, 0), np.float32), 0, 0
    found, as_it_stands = np.zeros(len(vocabulary), bool), np.zeros(len(vocabulary), bool)
    progress = Progress(f"reading {file}", unit="lines", size=1)
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        try:
            for number, line in enumerate(iter(functools.partial(lines.readline, LONGEST), b""), 1):
                if number % 1024 == 0:
                    progress.to(number)
                line = line.rstrip()
                if number == 1:
                    line = _first(file, line)
                    fields = line.split()
                    header = len(fields) == 2 and all(
                        field.isdigit() and len(field) < 10 for field in fields
                    )
                    width = int(fields[1]) if header else len(fields) - 1
                    if width < 1:
                        raise _malformed(file, 1, "a word and its vector", line)
                    if header:
                        continue
                word, _, values = line.partition(b" ")
                if line.count(b" ") != width:
                    *_, last = line.rsplit(b" ", width)[0].split(b" ")
                    if line.count(b" ") < width or _is_number(last):
                        raise _malformed(file, number, f"a word and {width} numbers", line)
                    continue  # one of the few "words" of GloVe 840B that have spaces in them
                if not vectors.size:  # a header may say anything, but this line has D numbers
                    vectors = np.zeros((len(vocabulary), width), np.float32)
                index = exact.get(word)
                stands = index is not None
                if index is None:
                    index = wanted.get(fold(word.decode("utf-8", "replace")).encode())
                if index is not None and (not found[index] or stands > as_it_stands[index]):
                    if not all(map(_is_number, values.split(b" "))):
                        raise _malformed(file, number, f"a word and {width} finite numbers", line)
                    vectors[index], found[index], as_it_stands[index] = values.split(), True, stands
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{file}, after line {number}: not a whole .gz file ({error}); fetch it again"
            ) from error
    if not number:
        raise _malformed(file, 1, "a word and its vector", b"")
    logging.info("%s: %d of %d words found.", file, found.sum(), len(vocabulary))
    if not found.any():
        some = ", ".join(map(repr, vocabulary[1:4]))
        raise ValueError(
            f"{file}: 0 of {len(vocabulary)} words found, which are such as {some}: is it the right "
            "file, of the same language, with words and not parts of words?"
        )
    return vectors, found


def _first(file: Path, line: bytes) -> bytes:
    """The first line, without a byte order mark."""
    encoding = encoding_of(line[:4])
    if not encoding.startswith("utf-8"):
        cure = "word vectors are read as UTF-8: save it as UTF-8"
        raise ValueError(f"{file}: is {encoding.upper()}, and {cure}")
    return line.removeprefix(codecs.BOM_UTF8)


def _is_number(field: bytes) -> bool:
    return bool(_NUMBER.fullmatch(field)) and abs(float(field)) <= _MOST


def _malformed(file: Path, number: int, expected: str, line: bytes) -> ValueError:
    start = line[:60].decode("utf-8", "replace") + ("..." if len(line) > 60 else "")
    return ValueError(
        f"{file}, line {number}: expected {expected}, found {len(line.split())} fields: {start!r}"
    )
