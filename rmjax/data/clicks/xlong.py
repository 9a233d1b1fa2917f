"""XLong (Ren et al. 2019): click logs of Alibaba with 1,000 items a user.

After the history, each user is asked about one clicked and one sampled item. One line of the
release is one example with these two questions; lines that share a history stay separate examples.
The item-side lists are not used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.shares import log_source
from rmjax.data.source import Source, cached, hash64
from rmjax.io import text
from rmjax.registry import SOURCES

NUM_ITEMS, NUM_USERS, HISTORY, SIDE = 3_269_017, 20_000, 1000, 184
FIELDS = ("index", "uid", "history", "pos item", "neg item", "pos item side", "neg item side")
_ID = "[0-9]{1,18}"  # 18 digits always fit in an i64
_IDS = re.compile(f"{_ID}(,{_ID})*")
ADVICE = (
    "Download XLong by hand from Alibaba's Tianchi, data set 22482 (login needed), the release of "
    "HPMN's authors. Set data.dir to the folder of the two files. Without the files: "
    "--config=configs/xlong.py with an empty config.data.dir simulates clicks."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """XLong has no settings."""


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Opens the source, see `rmjax.Source`; simulates clicks if config.data.dir is empty."""
    if not common.dir:
        logging.info("config.data.dir is empty: simulated clicks replace XLong.")
        values = SOURCES.settings("simulated_clicks", common.simulated, "config.data.simulated.")
        return SOURCES["simulated_clicks"].make(values, common, seed)
    return cached(open_xlong(common.dir, common.cache_dir, seed), common.ram_bytes)


def open_xlong(directory: str, cache_dir: str, seed: int, valid_fraction: float = 0.1) -> XLong:
    """Opens the source. A hash of (seed, uid) chooses the training users that become 'valid'.

    Args:
      directory: the folder with the two files, or the folder above its data/xlong.
      cache_dir: the folder for prepared data; '' means `paths.cache('')`.
      seed: seed of the choice of users.
      valid_fraction: share of the training users that become 'valid'; at least one user does.

    Returns:
      The source.

    Raises:
      FileNotFoundError: `directory` lacks one of the files.
      ValueError: a line is malformed, or there are fewer than two training users.
    """
    names = ("train_corpus_total_dual.txt", "test_corpus_total_dual.txt")
    files = records.find_files(directory, names, (".", "data/xlong"), ADVICE)
    source = XLong(records.prepare(XLongBuilder, cache_dir, files=files), positions_at_end=True)
    uid = source.stream_id("train")
    users = np.unique(uid)
    if len(users) < 2:
        expected = "expected two users or more, to hold one out for 'valid'"
        raise ValueError(f"{files[0]}: {expected}, found {len(users)}")
    count = max(1, round(valid_fraction * len(users)))
    held_out = users[np.argsort(hash64("xlong valid", seed, users))][:count]
    valid = np.isin(uid, held_out)
    source.rows |= {
        "train": ("train", np.flatnonzero(~valid)),
        "valid": ("train", np.flatnonzero(valid)),
    }
    log_source("XLong", source, "examples")
    return source


class XLong(records.Records):
    """The source that `open_xlong` returns."""

    numbering = "XLong's own item ids"


class XLongBuilder(records.StreamBuilder):
    """Prepares the records of the two files, in the order of their lines."""

    name = "xlong"

    def _split_generators(self, dl_manager):
        self.info.metadata.update(num_items=NUM_ITEMS, max_items=HISTORY, num_queries=2, streams={})
        train, test = self.builder_config.files
        return {
            "train": self._generate_examples("train", train),
            "test": self._generate_examples("test", test),
        }

    def _generate_examples(
        self, split: str, path: Path
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields the numbered records of a file."""
        streams = self.info.metadata["streams"].setdefault(split, [])
        for number, line in text.read_lines(path):
            uid, example = parse_line(line, path, number)
            streams.append(uid)
            yield number - 1, example
        if not streams:
            raise records.malformed(path, 1, FIELDS[0], "a line", "an empty file")


def parse_line(line: str, path: Path, number: int) -> tuple[int, dict[str, np.ndarray]]:
    """Parses a line of the release.

    Args:
      line: the line without its end.
      path: the file, for errors.
      number: the number of the line, from 1, for errors.

    Returns:
      (uid, record), see `StreamBuilder`.

    Raises:
      ValueError: a field is wrong; names the file, the line and the field.
    """

    def ids(field: int, count: int, high: int) -> np.ndarray:
        """Parses `count` ids below `high`."""
        entries = fields[field].split(",")
        if len(entries) != count:
            expected = "one id" if count == 1 else f"{count} comma-separated ids"
            actual = f"{len(entries)}: {fields[field]}"
            raise records.malformed(path, number, FIELDS[field], expected, actual)
        if not _IDS.fullmatch(fields[field]) or max(map(int, entries)) >= high:
            wrong = next(e for e in entries if not re.fullmatch(_ID, e) or int(e) >= high)
            expected = f"an integer in [0, {high})"
            raise records.malformed(path, number, FIELDS[field], expected, wrong)
        return np.array(entries, np.int32)

    fields = line.split("\t")
    if len(fields) != len(FIELDS):
        missing = FIELDS[min(len(fields), len(FIELDS) - 1)]
        expected, actual = f"{len(FIELDS)} tab-separated fields", f"{len(fields)}: {line}"
        raise records.malformed(path, number, missing, expected, actual)
    if not re.fullmatch("-?[0-9]+", fields[0]):
        raise records.malformed(path, number, FIELDS[0], "an integer", fields[0])
    uid = int(ids(1, 1, NUM_USERS)[0])
    history, pos, neg = ids(2, HISTORY, NUM_ITEMS), ids(3, 1, NUM_ITEMS), ids(4, 1, NUM_ITEMS)
    for field in (5, 6):
        entries = fields[field].split(",")
        if len(entries) != SIDE or not all(entries):
            actual = f"{sum(map(bool, entries))}: {fields[field]}"
            expected = f"{SIDE} comma-separated ids"
            raise records.malformed(path, number, FIELDS[field], expected, actual)
    return uid, {
        "items": history,
        "query": np.concatenate([pos, neg]),
        "position": np.full(2, HISTORY, np.int32),
        "target": np.array([1, 0], np.int32),
    }
