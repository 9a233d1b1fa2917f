"""MovieLens ratings (any release) as click streams.

A question asks whether the user rated this film next; its negative is a film of like popularity.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.clicks.splits import cuts
from rmjax.data.shares import log_source
from rmjax.data.source import Source, cached, hash64
from rmjax.io import paths, text
from rmjax.registry import at_least, between, setting

FIELDS = ("userId", "movieId", "rating", "timestamp")
# {file name: (separator, whether the file has a header)}
FORMATS = {"ratings.csv": (",", True), "ratings.dat": ("::", False), "u.data": ("\t", False)}
ADVICE = (
    "Unpack a release of https://grouplens.org/datasets/movielens and set data.dir to the folder "
    "of its ratings. Without a release: --config=configs/xlong.py with an empty config.data.dir "
    "simulates clicks."
)
WINDOW = 25  # a negative is at most so many ranks of popularity away
_ID = r"\d{1,18}"  # 18 digits always fit in an i64
_RATING = r"[0-5](?:\.\d+)?"
_LINES = 4096  # lines checked and converted at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """When questions are asked, and which of them are held out."""

    test_fraction: float = setting(
        0.2, between(0, 1), "share of the targets that form the test split: the latest"
    )
    valid_fraction: float = setting(
        0.1, between(0, 1), "share of the other targets that form the validation split: the latest"
    )
    every: int = setting(10, at_least(1), "number of clicks from one question to the next")
    first: int = setting(20, at_least(1), "number of clicks before the first question")
    max_targets: int = setting(
        32, at_least(1), "most targets of an example; a user with more gets several examples"
    )


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Opens the source, see `rmjax.Source`."""
    source = open_movielens(common.dir, common.cache_dir, seed, **vars(settings))
    return cached(source, common.ram_bytes)


class MovieLens(records.Records):
    """The source that `open_movielens` returns.

    Args:
      directory: the prepared data.

    Attributes:
      popularity: i64 [num_items], how often each item occurs in the training part. These counts
        are also the scores of a baseline.
      numbering: i64 [num_items], the movieId of each item.
    """

    popularity: np.ndarray

    def __init__(self, directory: Path):
        super().__init__(directory, positions_at_end=False)
        self.popularity = np.asarray(self.metadata["popularity"], np.int64)
        self.numbering = np.asarray(self.metadata["movies"], np.int64)

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Scores the questions by two rules without a model, see `Source.references`.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          Two scores f64 [size, Q]. 'popularity' is the popularity of the asked item. 'nearest id'
          is minus the distance between the numbers of the asked item and of the user's last item.
          Films that a user rates in one sitting are often neighbours by movieId.
        """
        streams = self.fetch(split, np.arange(self.size(split)))
        last = np.take_along_axis(streams["items"], np.maximum(streams["position"] - 1, 0), 1)
        return {
            "popularity": self.popularity[streams["query"]].astype(np.float64),
            "nearest id": -np.abs(streams["query"] - last).astype(np.float64),
        }


def open_movielens(
    directory: str,
    cache_dir: str,
    seed: int,
    test_fraction: float = 0.2,
    valid_fraction: float = 0.1,
    first: int = 20,
    every: int = 10,
    max_targets: int = 32,
) -> MovieLens:
    """Opens the source.

    A stream holds a user's items by time. Items are numbered by movieId. Items with equal times
    are ordered by hash(seed, user, movieId), so neither the order of the file nor the ids tell
    which one came first.

    The targets of a user are the interactions first, first + every, ... (counted from 0). Each is
    asked before it happens, beside a negative. The negative is an item that the user never rated,
    drawn by hash(seed, user, target) within `WINDOW` ranks of training popularity. An
    item that never occurs in training gets a negative that never occurs in training either.

    Two global cuts in time separate the splits: 'test' is the last `test_fraction` of the targets,
    'valid' the last `valid_fraction` of the others. An example has up to `max_targets` targets of
    a user, and the stream before the last of them.

    Args:
      directory: the folder of the ratings.
      cache_dir: the folder for prepared data; '' means `paths.cache('')`.
      seed: seed of the negatives and of the order of equal times.
      test_fraction: share of the targets that form 'test'.
      valid_fraction: share of the other targets that form 'valid'.
      first: number of interactions before the first target.
      every: number of interactions from one target to the next.
      max_targets: most targets of an example.

    Returns:
      The source.

    Raises:
      FileNotFoundError: `directory` has no ratings.
      ValueError: a line is malformed, a split has no target, or a user rated every item.
    """
    for name in FORMATS:
        if directory and (paths.resolve(directory, "config.data.dir") / name).is_file():
            break
    else:
        name = "ratings.csv"
    files = records.find_files(directory, (name,), (".",), ADVICE)
    parameters = dict(seed=seed, test_fraction=test_fraction, valid_fraction=valid_fraction)
    parameters |= dict(first=first, every=every, max_targets=max_targets)
    prepared = records.prepare(MovieLensBuilder, cache_dir, files=files, parameters=parameters)
    source = MovieLens(prepared)
    users, few = source.metadata["users"], source.metadata["few"]
    logging.info("MovieLens: %s of %s users are asked.", f"{users - few:,}", f"{users:,}")
    if few:
        message = "%s users have fewer than %d ratings, so none of theirs is asked."
        logging.info(message, f"{few:,}", first + 1)
    log_source("MovieLens", source, "examples")
    return source


class MovieLensBuilder(records.StreamBuilder):
    """Prepares the records. All splits and negatives are known before the first record."""

    name = "movielens"
    # Since 1.1.0 equal times are in a drawn order, and movieIds are in the metadata.
    VERSION = tfds.core.Version("1.1.0")

    def _split_generators(self, dl_manager):
        (path,), options = self.builder_config.files, self.builder_config.parameters
        user, movie, time = read_ratings(path)
        # Files are sorted by movieId: at equal times their order would reveal the next item.
        order = np.lexsort((hash64("movielens tie", options["seed"], user, movie), time, user))
        user, time = user[order], time[order]
        movies, item = np.unique(movie[order], return_inverse=True)
        _, start, owner = np.unique(user, return_index=True, return_inverse=True)
        place = np.arange(len(user)) - start[owner]  # number of earlier interactions of the user
        first, every = options["first"], options["every"]
        asked = np.flatnonzero((place >= first) & ((place - first) % every == 0))
        fractions = options["valid_fraction"], options["test_fraction"]
        train_end, test_start = cuts(time[asked], *fractions)
        popularity = np.bincount(item[time < train_end], minlength=len(movies))
        part = np.digitize(time[asked], [train_end, test_start])
        examples = {}
        for index, split in enumerate(("train", "valid", "test")):
            chosen = asked[part == index]
            if not len(chosen):
                raise ValueError(
                    f"{path}: expected targets in every split, found none of {len(asked)} in "
                    f"{split!r}: take more users, or lower config.data.movielens.first and every"
                )
            by_user = np.split(chosen, np.flatnonzero(np.diff(owner[chosen])) + 1)
            limit = options["max_targets"]
            examples[split] = [
                rows[i : i + limit] for rows in by_user for i in range(0, len(rows), limit)
            ]
        every_example = [rows for split in examples.values() for rows in split]
        streams = {
            split: user[[rows[0] for rows in chunks]].tolist() for split, chunks in examples.items()
        }
        self.info.metadata.update(
            num_items=len(movies),
            max_items=int(max(place[rows[-1]] for rows in every_example)),
            num_queries=2 * max(map(len, every_example)),
            streams=streams,
            popularity=popularity.tolist(),
            movies=movies.tolist(),
            users=len(start),
            few=len(start) - len(np.unique(owner[asked])),
            train_end=int(train_end),
            test_start=int(test_start),
        )
        try:
            negatives = match_popularity(asked, user, item, popularity, options["seed"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}; take a complete release") from error
        return {
            split: self._generate_examples(chunks, item, place, negatives)
            for split, chunks in examples.items()
        }

    def _generate_examples(
        self, chunks: list[np.ndarray], item: np.ndarray, place: np.ndarray, negatives: np.ndarray
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields the numbered records of a split."""
        for key, rows in enumerate(chunks):
            record = {
                "items": item[rows[0] - place[rows[0]] : rows[-1]].astype(np.int32),
                "query": np.stack([item[rows], negatives[rows]], 1).astype(np.int32).ravel(),
                "position": np.repeat(place[rows], 2).astype(np.int32),
                "target": np.tile(np.array([1, 0], np.int32), len(rows)),
            }
            yield key, record


def read_ratings(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads the ratings of a release.

    Args:
      path: a file whose name is in `FORMATS`.

    Returns:
      (user, movie, time), i64 [R] each, in the order of the file.

    Raises:
      ValueError: a line is malformed; names the line and the field. Or the file is a zip.
    """
    separator, header = FORMATS[path.name]
    rows = re.compile(f"(?:{separator.join([_ID, _ID, _RATING, _ID])}\n)*", re.ASCII)
    columns = [len(separator) * FIELDS.index(name) for name in ("userId", "movieId", "timestamp")]
    lines = (line for _, line in text.read_lines(path))  # blank lines are left out at the end only
    if header and (first := next(lines, "")) != separator.join(FIELDS):
        if first.startswith("PK"):  # the start of every zip, and so of an .xlsx
            raise ValueError(f"{path} is a zip or an Excel table: export it as CSV, or unpack it")
        wrong = records.malformed(path, 1, "header", separator.join(FIELDS), first)
        cure = "Take the file of the release, or write these four columns separated by commas"
        raise ValueError(f"{wrong}. {cure}")
    parts = [np.empty((0, len(columns)), np.int64)]
    number = 1 + header
    while block := list(itertools.islice(lines, _LINES)):
        if not rows.fullmatch("\n".join(block) + "\n"):
            raise _wrong(path, number, block, separator)
        # A separator of two characters equals two one-character separators and an empty field.
        parts.append(np.loadtxt(block, np.int64, delimiter=separator[0], usecols=columns, ndmin=2))
        number += len(block)
    user, movie, time = np.concatenate(parts).T
    return user, movie, time


def match_popularity(
    asked: np.ndarray, user: np.ndarray, item: np.ndarray, popularity: np.ndarray, seed: int
) -> np.ndarray:
    """Draws a negative of like popularity for each target.

    Args:
      asked: i64 [targets], rows of the interactions that are asked.
      user: i64 [R], the user of each interaction; sorted.
      item: i64 [R], the item of each interaction.
      popularity: i64 [num_items], how often each item occurs in the training part.
      seed: seed of the draws.

    Returns:
      i64 [R], the negative item at the rows `asked`, 0 at the others.

    Raises:
      ValueError: a user rated every item.
    """
    num_items, seen = len(popularity), int((popularity > 0).sum())
    tie = hash64("rank", np.arange(num_items))  # an order without meaning
    by_rank = np.lexsort((tie, -popularity))
    rank = np.argsort(by_rank)
    place = asked - np.searchsorted(user, user[asked])
    draws = hash64("movielens negative", seed, user[asked], place)
    negatives, rated, current = np.zeros(len(item), np.int64), np.zeros(num_items, bool), None
    for row, draw in zip(asked, draws, strict=True):
        if user[row] != current:
            current = user[row]
            rated[:] = False
            rated[item[slice(*np.searchsorted(user, [current, current + 1]))]] = True
        middle = rank[item[row]]
        group = (0, seen) if middle < seen else (seen, num_items)
        near = _unrated_near(by_rank, rated, middle, group)
        if not len(near):
            near = _unrated_near(by_rank, rated, middle, (0, num_items))
        if not len(near):
            raise ValueError(f"user {current} rated every item: no negative is left")
        negatives[row] = near[int(draw) % len(near)]
    return negatives


def _unrated_near(
    by_rank: np.ndarray, rated: np.ndarray, middle: int, group: tuple[int, int]
) -> np.ndarray:
    """Finds unrated items of a range of ranks within `WINDOW` ranks of `middle`.

    The window doubles until an item is in it, or until all items are.
    """
    near, width = by_rank[:0], WINDOW
    while not len(near) and width < 2 * len(by_rank) + WINDOW:
        near = by_rank[max(group[0], middle - width) : min(group[1], middle + width + 1)]
        near = near[~rated[near]]
        width *= 2
    return near


def _wrong(path: Path, start: int, lines: list[str], separator: str) -> ValueError:
    """Makes the error of the first malformed line; `start` is the number of the first line."""
    patterns = {name: _RATING if name == "rating" else _ID for name in FIELDS}
    for number, line in enumerate(lines, start):
        entries = line.split(separator)
        if len(entries) != len(FIELDS):
            missing = FIELDS[min(len(entries), len(FIELDS) - 1)]
            expected = f"{len(FIELDS)} fields split by {separator!r}"
            return records.malformed(path, number, missing, expected, line)
        for (field, pattern), entry in zip(patterns.items(), entries, strict=True):
            if not re.fullmatch(pattern, entry, re.ASCII):
                digits = re.fullmatch(r"\d+", entry, re.ASCII)
                integer = "an integer of at most 18 digits" if digits else "an integer of 0 or more"
                expected = "a rating from 0 to 5" if field == "rating" else integer
                return records.malformed(path, number, field, expected, entry)
    raise AssertionError(lines)
