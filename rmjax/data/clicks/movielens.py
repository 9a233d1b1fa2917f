"""MovieLens ratings (any release) as click streams: was it this film that came next, or one just as popular?"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from rmjax.data import records
from rmjax.data.source import Source, cached, hash64
from rmjax.io import paths, text
from rmjax.registry import at_least, between, setting

FIELDS = ("userId", "movieId", "rating", "timestamp")
FORMATS = {
    "ratings.csv": (",", True),
    "ratings.dat": ("::", False),
    "u.data": ("\t", False),
}  # separator, header
ADVICE = (
    "Unpack a release of https://grouplens.org/datasets/movielens and set data.dir to the folder of its ratings. "
    "Without it: --config=configs/xlong.py with config.data.dir empty simulates clicks."
)
WINDOW = 25  # ranks of popularity to either side a negative comes from
_ID = r"\d{1,18}"  # always fits in an i64
_RATING = r"[0-5](?:\.\d+)?"
_LINES = 4096  # checked and converted at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """When questions are asked, and which are the test."""

    test_fraction: float = setting(0.2, between(0, 1), "share of targets, the latest, for the test")
    valid_fraction: float = setting(
        0.1, between(0, 1), "share of the targets before those, for validation"
    )
    every: int = setting(10, at_least(1), "clicks from one question to the next")
    first: int = setting(20, at_least(1), "clicks before the first question")
    max_targets: int = setting(
        32, at_least(1), "most targets of an example; a user with more has several"
    )


def make(settings: Settings, common: Any, seed: int) -> Source:
    return cached(
        open_movielens(common.dir, common.cache_dir, seed, **vars(settings)), common.ram_bytes
    )


class MovieLens(records.Records):
    """The source.

    `popularity` i64 [num_items] counts each item in the training part: a baseline's scores.
    `numbering` i64 [num_items] is the movieId of each item.
    """

    popularity: np.ndarray

    def __init__(self, directory: Path):
        super().__init__(directory, positions_at_end=False)
        self.popularity = np.asarray(self.metadata["popularity"], np.int64)
        self.numbering = np.asarray(self.metadata["movies"], np.int64)

    def references(self, split: str) -> dict[str, np.ndarray]:
        """What two readers without a model answer, f64 [size, Q].

        'popularity' is that of the asked item. 'nearest id' is minus the distance between its number and that of the
        user's last item: films that a user rates in one sitting are often neighbours by movieId.
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
    """The source. A stream is a user's items by time; items are numbered by movieId.

    Items of one time are in the order of hash(seed, user, movieId): neither the file's order nor ids say which came
    first.

    Targets are interactions first, first + every, ... (from 0), each asked before it happens beside a negative: an item
    the user never rated, drawn by hash(seed, user, target) within `WINDOW` ranks of training popularity (unseen items
    among unseen ones). Two global cuts in time: 'test' is the last `test_fraction` of the targets, 'valid' the last
    `valid_fraction` of the others. An example is up to `max_targets` targets of a user and the stream before the last.

    Raises:
      FileNotFoundError: `directory` has no ratings.
      ValueError: a malformed line, or a split without a target.
    """
    for name in FORMATS:
        if directory and (paths.resolve(directory, "config.data.dir") / name).is_file():
            break
    else:
        name = "ratings.csv"
    files = records.find_files(directory, (name,), (".",), ADVICE)
    parameters = dict(
        seed=seed,
        test_fraction=test_fraction,
        valid_fraction=valid_fraction,
        first=first,
        every=every,
        max_targets=max_targets,
    )
    source = MovieLens(
        records.prepare(MovieLensBuilder, cache_dir, files=files, parameters=parameters)
    )
    users, few = source.metadata["users"], source.metadata["few"]
    logging.info("MovieLens: %s of %s users are asked.", f"{users - few:,}", f"{users:,}")
    if few:
        logging.info(
            "%s users have fewer than %d ratings, so none of theirs is asked.",
            f"{few:,}",
            first + 1,
        )
    return source


class MovieLensBuilder(records.StreamBuilder):
    """Everything is settled before the first record is written."""

    name = "movielens"
    VERSION = tfds.core.Version(
        "1.1.0"
    )  # equal times are in a drawn order; movieIds are in the metadata

    def _split_generators(self, dl_manager):
        (path,), options = self.builder_config.files, self.builder_config.parameters
        user, movie, time = read_ratings(path)
        # Files are sorted by movieId: where times are equal, their order would tell the next item.
        order = np.lexsort((hash64("movielens tie", options["seed"], user, movie), time, user))
        user, time = user[order], time[order]
        movies, item = np.unique(movie[order], return_inverse=True)
        _, start, owner = np.unique(user, return_index=True, return_inverse=True)
        place = np.arange(len(user)) - start[owner]  # interactions of the user before this one
        asked = np.flatnonzero(
            (place >= options["first"]) & ((place - options["first"]) % options["every"] == 0)
        )
        train_end, test_start = _cuts(
            time[asked], options["valid_fraction"], options["test_fraction"]
        )
        popularity = np.bincount(item[time < train_end], minlength=len(movies))
        part = np.digitize(time[asked], [train_end, test_start])
        examples = {}
        for index, split in enumerate(("train", "valid", "test")):
            chosen = asked[part == index]
            if not len(chosen):
                raise ValueError(
                    f"{path}: expected targets in every split, found none of {len(asked)} in {split!r}: take more "
                    "users, or lower config.data.movielens.first and every"
                )
            by_user = np.split(chosen, np.flatnonzero(np.diff(owner[chosen])) + 1)
            limit = options["max_targets"]
            examples[split] = [
                rows[i : i + limit] for rows in by_user for i in range(0, len(rows), limit)
            ]
        every_example = [rows for split in examples.values() for rows in split]
        self.info.metadata.update(
            num_items=len(movies),
            max_items=int(max(place[rows[-1]] for rows in every_example)),
            num_queries=2 * max(map(len, every_example)),
            streams={
                split: user[[rows[0] for rows in chunks]].tolist()
                for split, chunks in examples.items()
            },
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
            raise ValueError(f"{path}: {error}; take a whole release") from error
        return {
            split: self._generate_examples(chunks, item, place, negatives)
            for split, chunks in examples.items()
        }

    def _generate_examples(
        self, chunks: list[np.ndarray], item: np.ndarray, place: np.ndarray, negatives: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, rows in enumerate(chunks):
            yield (
                key,
                {
                    "items": item[rows[0] - place[rows[0]] : rows[-1]].astype(np.int32),
                    "query": np.stack([item[rows], negatives[rows]], 1).astype(np.int32).ravel(),
                    "position": np.repeat(place[rows], 2).astype(np.int32),
                    "target": np.tile(np.array([1, 0], np.int32), len(rows)),
                },
            )


def read_ratings(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, movie, time), i64 [R] each, in the file's order; ValueError names the line and field that is wrong."""
    separator, header = FORMATS[path.name]
    rows = re.compile(f"(?:{separator.join([_ID, _ID, _RATING, _ID])}\n)*", re.ASCII)
    columns = [len(separator) * FIELDS.index(name) for name in ("userId", "movieId", "timestamp")]
    lines = (line for _, line in text.read_lines(path))  # none is left out before the last
    if header and (first := next(lines, "")) != separator.join(FIELDS):
        if first.startswith("PK"):  # as every zip begins, and so an .xlsx
            raise ValueError(f"{path} is a zip or a table of Excel: export it as CSV, or unpack it")
        wrong = records.malformed(path, 1, "header", separator.join(FIELDS), first)
        raise ValueError(
            f"{wrong}. Take the file of the release, or write these four columns with commas between"
        )
    parts = [np.empty((0, len(columns)), np.int64)]
    number = 1 + header
    while block := list(itertools.islice(lines, _LINES)):
        if not rows.fullmatch("\n".join(block) + "\n"):
            raise _wrong(path, number, block, separator)
        # A separator of two characters is one of one character with empty fields between.
        parts.append(np.loadtxt(block, np.int64, delimiter=separator[0], usecols=columns, ndmin=2))
        number += len(block)
    user, movie, time = np.concatenate(parts).T
    return user, movie, time


def match_popularity(
    asked: np.ndarray, user: np.ndarray, item: np.ndarray, popularity: np.ndarray, seed: int
) -> np.ndarray:
    """i64 [R], at rows `asked` the negative of that interaction (elsewhere 0). Rows are sorted by `user`."""
    num_items, seen = len(popularity), int((popularity > 0).sum())
    by_rank = np.lexsort(
        (hash64("rank", np.arange(num_items)), -popularity)
    )  # ties in no order that means anything
    rank = np.argsort(by_rank)
    draws = hash64(
        "movielens negative", seed, user[asked], asked - np.searchsorted(user, user[asked])
    )
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
    """Items not rated within `WINDOW` ranks of `middle` and inside `group`; the window doubles until there is one."""
    near, width = by_rank[:0], WINDOW
    while not len(near) and width < 2 * len(by_rank) + WINDOW:
        near = by_rank[max(group[0], middle - width) : min(group[1], middle + width + 1)]
        near = near[~rated[near]]
        width *= 2
    return near


def _cuts(times: np.ndarray, valid_fraction: float, test_fraction: float) -> tuple[int, int]:
    """First times of 'valid' and of 'test', so that the fractions are met as nearly as equal times allow."""

    def cut(times, fraction):
        return (
            np.sort(times)[min(int((1 - fraction) * len(times)), len(times) - 1)]
            if len(times)
            else 0
        )

    test_start = cut(times, test_fraction)
    return cut(times[times < test_start], valid_fraction), test_start


def _wrong(path: Path, start: int, lines: list[str], separator: str) -> ValueError:
    """The error of the first of these lines, numbered from `start`, that is no rating."""
    patterns = {name: _RATING if name == "rating" else _ID for name in FIELDS}
    for number, line in enumerate(lines, start):
        entries = line.split(separator)
        if len(entries) != len(FIELDS):
            missing = FIELDS[min(len(entries), len(FIELDS) - 1)]
            return records.malformed(
                path, number, missing, f"{len(FIELDS)} fields split by {separator!r}", line
            )
        for (field, pattern), entry in zip(patterns.items(), entries, strict=True):
            if not re.fullmatch(pattern, entry, re.ASCII):
                digits = re.fullmatch(r"\d+", entry, re.ASCII)
                integer = "an integer of at most 18 digits" if digits else "an integer of 0 or more"
                expected = "a rating from 0 to 5" if field == "rating" else integer
                return records.malformed(path, number, field, expected, entry)
    raise AssertionError(lines)
