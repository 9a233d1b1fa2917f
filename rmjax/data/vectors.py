"""Word vectors trained elsewhere (GloVe, word2vec, fastText), of the words of a vocabulary."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def read_vectors(path: str, vocabulary: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(vectors f32 [V, D], found bool [V]) of the words of `vocabulary`, by id; where found is false there are zeros.

    The file is text, or text in .gz: `word v1 ... vD` a line; of two lines of one word the first counts. A first line
    of two integers is word2vec's header, how many words and D. Lines are read one by one and only what is asked for
    is kept.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line of another width or with a value that is no finite number; an empty file, a damaged .gz.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"word vectors {path!r} not found: expected a text file of `word v1 ... vD` lines (.txt, or .gz of it), "
            "such as glove.6B.300d.txt of https://nlp.stanford.edu/projects/glove"
        )
    wanted = {word.encode(): index for index, word in enumerate(vocabulary)}
    vectors, found, number = np.zeros((0, 0), np.float32), np.zeros(len(vocabulary), bool), 0
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                line = line.rstrip()
                if number == 1:
                    fields = line.split()
                    header = len(fields) == 2 and all(field.isdigit() for field in fields)
                    width = int(fields[1]) if header else len(fields) - 1
                    if width < 1:
                        raise _malformed(file, 1, "a word and its vector", line)
                    vectors = np.zeros((len(vocabulary), width), np.float32)
                    if header:
                        continue
                word, _, values = line.partition(b" ")
                if line.count(b" ") != width:
                    *_, last = line.rsplit(b" ", width)[0].split(b" ")
                    if line.count(b" ") < width or _is_number(last):
                        raise _malformed(file, number, f"a word and {width} numbers", line)
                    continue  # one of the few "words" of GloVe 840B that have spaces in them
                index = wanted.get(word)
                if index is not None and not found[index]:
                    if not all(map(_is_number, values.split())):
                        raise _malformed(file, number, f"a word and {width} finite numbers", line)
                    vectors[index], found[index] = values.split(), True
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file}, after line {number}: not a whole .gz file ({error}); fetch it again") from error
    if not number:
        raise _malformed(file, 1, "a word and its vector", b"")
    return vectors, found


def _is_number(field: bytes) -> bool:
    try:
        return math.isfinite(float(field))
    except ValueError:
        return False


def _malformed(file: Path, number: int, expected: str, line: bytes) -> ValueError:
    start = line[:60].decode("utf-8", "replace") + ("..." if len(line) > 60 else "")
    return ValueError(f"{file}, line {number}: expected {expected}, found {len(line.split())} fields: {start!r}")
