"""Clicks from a user's own table: CSV, Parquet, Arrow, RecBole's .inter, or a data frame.

A question asks which item comes next; or whether an item does, beside one that the user never had.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax.data.clicks import baselines
from rmjax.data.clicks.splits import cuts
from rmjax.data.source import SPLITS, Examples, Questions, Source, hash64, id_array
from rmjax.data.tables.events import Events, open_events, prepare, slices
from rmjax.data.tables.rows import Columns
from rmjax.registry import (
    SOURCES,
    Conditions,
    a_path,
    anything,
    at_least,
    between,
    one_of,
    setting,
)

WINDOW = 25  # a negative of like popularity is at most so many ranks away, if one is free
_DRAWS = 64  # draws of a negative, after which the free items are counted
_BLOCK = 1 << 22  # about as many events are searched for negatives at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which columns are read, when questions are asked, and which of them are held out."""

    ranks_items: ClassVar[bool] = True
    read_if: ClassVar[Conditions] = {
        "test_fraction": ("split", ("time", "user")),
        "valid_fraction": ("split", ("time", "user")),
        "hold_out": ("split", ("last",)),
        "exclude_seen": ("ask", ("next",)),
        "negatives": ("ask", ("pairs",)),
    }

    path: str = setting(
        "",
        a_path,
        "file of events (.csv, .tsv, .inter, .parquet, .arrow, .feather), or a folder of such; "
        "folders inside it are read too",
    )
    user: str = setting("user_id", anything, "column of users: integers or strings")
    item: str = setting("item_id", anything, "column of items: integers or strings")
    time: str = setting(
        "timestamp",
        anything,
        "column of times: numbers, timestamps, or ISO texts, which are UTC without a zone",
    )
    session: str = setting(
        "",
        anything,
        "column of sessions; a stream then holds one session of a user; empty: all events",
    )
    event: str = setting("", anything, "column of kinds of events; empty: all rows are events")
    events: str = setting("", anything, "kinds that are kept, separated by commas")
    bad_rows: str = setting(
        "error",
        one_of("error", "skip"),
        "rows without an id, a time or a kind of event: an error, or left out and counted",
    )
    split: str = setting(
        "time",
        one_of("time", "last", "user"),
        "held-out targets: those after two cuts in time; the last ones of each stream; those of "
        "some users",
    )
    test_fraction: float = setting(
        0.2,
        between(0, 1),
        "time: share of the targets that form the test split; user: share of the users",
    )
    valid_fraction: float = setting(
        0.1, between(0, 1), "share of the other targets, or users, that form the validation split"
    )
    hold_out: int = setting(
        1,
        at_least(1),
        "last: events at the end of a stream that form the test split, and as many before them "
        "the validation split",
    )
    ask: str = setting(
        "next",
        one_of("next", "pairs"),
        "next: which item comes next; pairs: whether an item does, beside another one",
    )
    exclude_seen: bool = setting(
        False, anything, "next: a user's earlier items do not compete with the next one"
    )
    negatives: str = setting(
        "popularity",
        one_of("popularity", "uniform"),
        "pairs: the other item is one of like popularity, or any that the user never had",
    )
    first: int = setting(20, at_least(1), "number of events before the first question")
    every: int = setting(10, at_least(1), "number of events from one question to the next")
    max_targets: int = setting(
        32, at_least(1), "most targets of an example; a stream with more gives several examples"
    )
    max_items: int = setting(1000, at_least(0),
        "most items of an example: the latest ones before its last target; 0: all")  # fmt: skip


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Opens the source, see `rmjax.Source`."""
    if not settings.path:
        cure = "set config.data.table.path to a file of events"
        raise FileNotFoundError(f"config.data.table.path is empty: {cure}")
    return _open(settings.path, settings, common.segment_length, common.cache_dir, seed)


def open_table(
    table: Any,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    *,
    segment_length: int = 20,
    cache_dir: str = "",
    seed: int = 0,
    **settings: Any,
) -> Table:
    """Opens a user's own events as a source for `rmjax.fit`.

    A stream holds a user's items by time. Items with equal times are ordered by
    hash(seed, user, item), so neither the order of the table nor the ids tell which came first. An
    event with the user, item and time of another one is kept once.

    A question is asked before the events first, first + every, ... (counted from 0). With
    split='last' the held-out events are asked too, each in an example of its own. The stream of an
    example never holds a target before the target's question. With ask='pairs' a question sees
    whole segments only. The oldest items of a stream are then dropped, fewer than a segment, where
    this lets every question see more of the latest ones.

    Args:
      table: the path of a file (.csv, .tsv, .inter, .parquet, .arrow, .feather) or of a folder of
        such files; or a data frame of pandas or polars, a table of pyarrow, or a dict of columns.
      user: the column of users. Ids are integers or strings. In a file without types they are
        integers if all of them are written as Python writes integers; otherwise all are strings.
      item: the column of items; ids as for users.
      time: the column of times: numbers in any unit, timestamps, or ISO texts. Times without a zone
        are UTC.
      segment_length: N of the run, `config.data.segment_length`.
      cache_dir: the folder for prepared data; '' means `~/.cache/rmjax`.
      seed: seed of the order of equal times, of held-out users and of negatives.
      **settings: further fields of `Settings`.

    Returns:
      The source.

    Raises:
      ModuleNotFoundError: pyarrow is not installed; names the extra.
      FileNotFoundError: there is no such file.
      TypeError: `table` is no table, or a setting is unknown.
      ValueError: a column, row or setting is wrong; names it and the cure. Or a split is empty.
    """
    values = vars(Settings(user=user, item=item, time=time, **settings))
    options = SOURCES.settings("table", values, "config.data.table.")
    return _open(table, options, segment_length, cache_dir, seed)


def _open(table: Any, settings: Settings, segment_length: int, cache_dir: str, seed: int) -> Table:
    """Prepares the events and opens the source."""
    s = settings
    if s.ask == "pairs" and s.first < segment_length:
        cause = f"config.data.table.first = {s.first}: must be at least config.data.segment_length"
        cure = "raise it, or lower config.data.segment_length (segment_length of rmjax.open_table)"
        raise ValueError(f"{cause} = {segment_length}, since pairs see whole segments only: {cure}")
    if s.max_items and s.max_items < s.first:
        cause = f"config.data.table.max_items = {s.max_items}: must be at least"
        raise ValueError(f"{cause} config.data.table.first = {s.first}, or 0")
    if bool(s.event) != bool(s.events):
        one, other = ("event", "events") if s.event else ("events", "event")
        raise ValueError(f"config.data.table.{one} needs config.data.table.{other}: set both")
    fields = [field.name for field in dataclasses.fields(Columns)]
    chosen = Columns(**{name: getattr(s, name) for name in fields})
    source = Table(prepare(table, chosen, cache_dir, seed), settings, segment_length, seed)
    source.log()
    return source


class Asked(NamedTuple):
    """The targets of a split, and the examples that ask for them.

    Attributes:
      rows: i64 [n], the targets' places in `Events.items`, ascending.
      bounds: i64 [E + 1], where the examples begin in `rows`.
      starts: i64 [E], the place of an example's first item in `Events.items`.
      streams: i64 [E], the stream of each example.
      negatives: i32 [n], the item beside each target; None unless pairs are asked.
    """

    rows: np.ndarray
    bounds: np.ndarray
    starts: np.ndarray
    streams: np.ndarray
    negatives: np.ndarray | None = None


class Table(Source):
    """The source that `open_table` returns.

    Args:
      folder: the prepared events.
      settings: when questions are asked.
      segment_length: N.
      seed: seed of held-out users and of negatives.

    Attributes:
      events: the events.
      asked: the targets of each split.
    """

    popularity: np.ndarray
    positions_at_end = False

    def __init__(self, folder: Path, settings: Settings, segment_length: int, seed: int):
        self._made_of = folder, settings, segment_length, seed
        self.settings, self.events = settings, open_events(folder)
        events, pairs = self.events, settings.ask == "pairs"
        self._queries = 2 if pairs else 1  # of each target
        self.num_items, self.numbering = len(events.ids), id_array(events.ids)
        targets, self._until = split_targets(events, settings, seed)
        self.popularity = count_items(events, self._until)
        self.asked = {
            split: cut_examples(events, settings, segment_length, split, *chosen)
            for split, chosen in targets.items()
        }
        if empty := [split for split, asked in self.asked.items() if not len(asked.rows)]:
            total = sum(len(asked.rows) for asked in self.asked.values())
            cure = "take more users, or lower config.data.table.first and every"
            cause = f"expected targets in every split, found none of {total} in {empty[0]!r}"
            raise ValueError(f"{events.place}: {cause}: {cure}")
        if pairs:
            self.asked = {
                split: asked._replace(negatives=self._negatives(asked.rows, seed))
                for split, asked in self.asked.items()
            }
        else:
            seen = settings.exclude_seen
            self.questions = Questions(
                "kind", 1, answer="item", metric="ndcg@10", exclude_seen=seen
            )
        last = {split: asked.rows[asked.bounds[1:] - 1] for split, asked in self.asked.items()}
        self.max_items = max(int((last[s] - self.asked[s].starts).max()) for s in SPLITS)
        targets_most = max(int(np.diff(asked.bounds).max()) for asked in self.asked.values())
        self.num_queries = self._queries * targets_most

    def __reduce__(self):  # a copy in another process maps the same files
        return Table, self._made_of

    def size(self, split: str) -> int:
        """See `Source.size`."""
        return len(self.asked[split].starts)

    def stream_id(self, split: str) -> np.ndarray:
        """See `Source.stream_id`; a stream is a user, or a session of a user."""
        return self.asked[split].streams

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`."""
        asked, items = self.asked[split], self.events.items
        targets = self.num_queries // self._queries
        place = asked.bounds[indices][:, None] + np.arange(targets)
        mask = place < asked.bounds[indices + 1][:, None]
        place = np.where(mask, place, 0)
        start = asked.starts[indices]
        rows = asked.rows[place]
        length = asked.rows[asked.bounds[indices + 1] - 1] - start
        steps = np.arange(self.max_items)
        inside = steps < length[:, None]
        stream = items[np.where(inside, start[:, None] + steps, 0)]
        right = items[rows]
        if asked.negatives is not None:
            shape = len(indices), self.num_queries
            query = np.stack([right, asked.negatives[place]], 2).reshape(shape)
            target = np.tile(np.array([1, 0], np.int32), (len(indices), targets))
            mask, rows = np.repeat(mask, 2, 1), np.repeat(rows, 2, 1)
        else:
            query, target = np.zeros_like(right), right
        return {
            "items": np.where(inside, stream, 0).astype(np.int32),
            "length": length.astype(np.int32),
            "query": np.where(mask, query, 0).astype(np.int32),
            "query_mask": mask,
            "target": np.where(mask, target, 0).astype(np.int32),
            "position": np.where(mask, rows - start[:, None], 0).astype(np.int32),
            "example_id": np.asarray(indices, np.int32),
        }

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Answers the questions by rules without a model, see `Source.references`.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          Ranks of the next item by the rules of `baselines.references`. Or scores of pairs, f64
          [size, Q]: the popularity of the asked item; and minus the distance between the numbers of
          the asked item and of the stream's last one.
        """
        asked, events = self.asked[split], self.events
        place = np.arange(self.num_queries) < self._queries * np.diff(asked.bounds)[:, None]
        if asked.negatives is None:
            before, target = np.zeros((2, *place.shape), np.int64)
            begins = np.repeat(events.starts[asked.streams], np.diff(asked.bounds))
            before[place], target[place] = asked.rows - begins, events.items[asked.rows]
            train = training_part(events, self._until)
            log = baselines.Log(events.starts, events.items, train, self.num_items)
            cut = asked.starts - events.starts[asked.streams]
            questions = baselines.Asked(asked.streams, before, target, cut)
            return baselines.references(log, questions, self.questions.exclude_seen)
        query = np.stack([events.items[asked.rows], asked.negatives], 1)
        last = events.items[asked.rows - 1][:, None]
        scores = {"popularity": self.popularity[query], "nearest id": -np.abs(query - last)}
        filled = {name: np.zeros(place.shape) for name in scores}
        for name, values in scores.items():
            filled[name][place] = values.ravel()
        return filled

    def neighbours(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Source.neighbours`: the events right before and right after in a stream."""
        events, train = self.events, training_part(self.events, self._until)
        pairs = []
        for part in slices(len(events.items)):
            places = np.flatnonzero(items[events.items[part]] & train[part]) + part.start
            stream = np.searchsorted(events.starts, places, "right") - 1
            for step in (-1, 1):
                beside = np.clip(places + step, 0, len(train) - 1)
                inside = (beside >= events.starts[stream]) & (beside < events.starts[stream + 1])
                chosen = inside & train[beside] & ~items[events.items[beside]]
                pairs.append((events.items[places[chosen]], events.items[beside[chosen]]))
        one, other = (
            np.concatenate(column).astype(np.int64) for column in zip(*pairs, strict=True)
        )
        return one, other

    def log(self) -> None:
        """Logs what was read, what was left out and why, and who is asked."""
        self.events.report()
        events, first, users = self.events, self.settings.first, len(self.events.user_keys)
        long = np.diff(events.starts) > first
        asked = np.count_nonzero(np.bincount(events.users[long]))
        logging.info("Table: %s of %s users are asked.", f"{asked:,}", f"{users:,}")
        if asked < users:
            few = f"{users - asked:,} users have fewer than {first + 1} events"
            where = " in every session" if self.settings.session else ""
            logging.info("%s%s, so none of theirs is asked.", few, where)

    def _negatives(self, rows: np.ndarray, seed: int) -> np.ndarray:
        matched = self.settings.negatives == "popularity"
        return draw_negatives(self.events, rows, self.popularity, matched, seed)


def split_targets(
    events: Events, settings: Settings, seed: int
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Chooses the targets of every split.

    Args:
      events: the streams.
      settings: how they are split.
      seed: seed of the users that are held out.

    Returns:
      {split: (rows of the targets i64 [n], the stream of each i64 [n])}, ascending; and i64 [S],
      the row at which each stream's part for training ends.
    """
    s, begin, end = settings, events.starts[:-1], events.starts[1:]
    if s.split == "last":
        ends = [np.maximum(begin, end - k * s.hold_out) for k in (2, 1, 0)]
        parts = {"train": spread(begin + s.first, ends[0], s.every)}
        for split, (low, high) in zip(SPLITS[1:], itertools.pairwise(ends), strict=True):
            parts[split] = spread(np.maximum(low, begin + s.first), high, 1)
        return parts, ends[0]
    rows, stream = spread(begin + s.first, end, s.every)
    if s.split == "time":
        time = events.times[rows]
        train_end, test_start = cuts(time, s.valid_fraction, s.test_fraction)
        part = np.digitize(time, [train_end, test_start])
        until = begin + np.add.reduceat(events.times < train_end, begin, dtype=np.int64)
    else:
        of_user = np.full(len(events.user_keys), -1)
        users = np.flatnonzero(np.bincount(events.users[stream]))
        users = users[np.argsort(hash64("table user", seed, events.user_keys[users]))]
        test = round(s.test_fraction * len(users))
        of_user[users] = 0
        of_user[users[: test + round(s.valid_fraction * (len(users) - test))]] = 1
        of_user[users[:test]] = 2
        part = of_user[events.users[stream]]
        until = np.where(np.isin(of_user[events.users], (1, 2)), begin, end)
    return {name: (rows[part == k], stream[part == k]) for k, name in enumerate(SPLITS)}, until


def cut_examples(
    events: Events,
    settings: Settings,
    segment_length: int,
    split: str,
    rows: np.ndarray,
    stream: np.ndarray,
) -> Asked:
    """Groups the targets of a split into examples.

    Args:
      events: the streams.
      settings: the sizes of examples.
      segment_length: N.
      split: 'train', 'valid' or 'test'.
      rows: i64 [n], the targets.
      stream: i64 [n], their streams, ascending.

    Returns:
      The examples, without negatives.
    """
    s, most = settings, settings.max_targets
    if s.max_items:  # the first question of an example has `first` items before it, too
        most = min(most, 1 + (s.max_items - s.first) // s.every)
    if s.split == "last" and split != "train":
        most = 1
    if not len(rows):
        return Asked(rows, np.zeros(1, np.int64), rows, stream)
    _, begin, count = np.unique(stream, return_index=True, return_counts=True)
    place = np.arange(len(rows)) - np.repeat(begin, count)
    bounds = np.append(np.flatnonzero(place % most == 0), len(rows))
    stream = stream[bounds[:-1]]
    start = events.starts[stream]
    if s.max_items:
        start = np.maximum(start, rows[bounds[1:] - 1] - s.max_items)
    if s.ask == "pairs":  # the next item is also asked after the items behind the last segment
        over = (rows - np.repeat(start, np.diff(bounds))) % segment_length
        start = start + np.minimum.reduceat(over, bounds[:-1])
    return Asked(rows, bounds, start, stream)


def spread(begin: np.ndarray, end: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows begin, begin + step, ... below end, of every stream.

    Args:
      begin: i64 [S].
      end: i64 [S].
      step: from one row to the next.

    Returns:
      Rows i64 [n], and their streams i64 [n].
    """
    count = np.maximum(0, -(-(end - begin) // step))
    stream = np.repeat(np.arange(len(begin)), count)
    place = np.arange(len(stream)) - np.repeat(np.cumsum(count) - count, count)
    return begin[stream] + step * place, stream


def training_part(events: Events, until: np.ndarray) -> np.ndarray:
    """Whether each event is in the part for training.

    Args:
      events: the streams.
      until: i64 [S], the row at which each stream's part for training ends.

    Returns:
      bool [R].
    """
    change = np.zeros(len(events.items) + 1, np.int8)
    change[events.starts[:-1]] += 1
    np.subtract.at(change, until, 1)
    return np.cumsum(change, out=change)[:-1].view(bool)


def count_items(events: Events, until: np.ndarray) -> np.ndarray:
    """Counts how often each item occurs in the part for training.

    Args:
      events: the streams.
      until: i64 [S], the row at which each stream's part for training ends.

    Returns:
      i64 [num_items].
    """
    counted = training_part(events, until)
    popularity = np.zeros(len(events.ids), np.int64)
    for part in slices(len(events.items)):
        chosen = events.items[part][counted[part]]
        popularity += np.bincount(chosen, minlength=len(popularity))
    return popularity


def draw_negatives(
    events: Events, rows: np.ndarray, popularity: np.ndarray, matched: bool, seed: int
) -> np.ndarray:
    """Draws an item that the user never has, for each target.

    A draw depends on (seed, user, place of the target), not on other users. An item that never
    occurs in training gets a matched negative that never occurs in training either, if one is free.

    Args:
      events: the streams.
      rows: i64 [n], the targets, ascending.
      popularity: i64 [num_items], how often each item occurs in the part for training.
      matched: whether the item has a like popularity: it is at most `WINDOW` ranks away.
      seed: seed of the draws.

    Returns:
      i32 [n].

    Raises:
      ValueError: a user has every item.
    """
    num_items, users = len(popularity), len(events.user_keys)
    by_rank = np.lexsort((hash64("rank", np.arange(num_items)), -popularity))
    rank = np.argsort(by_rank)
    seen = int((popularity > 0).sum()) if matched else num_items
    begins = events.starts[np.searchsorted(events.users, np.arange(users + 1))]
    cut = np.searchsorted(begins, np.arange(0, begins[-1], _BLOCK))
    negatives = np.empty(len(rows), np.int32)
    for low, high in itertools.pairwise(np.unique([*cut, users])):
        first, last = begins[low], begins[high]
        owner = np.repeat(np.arange(high - low), np.diff(begins[low : high + 1]))
        items = events.items[first:last]
        has = np.sort(owner * num_items + items)
        block = slice(*np.searchsorted(rows, [first, last]))
        asked, user = rows[block], owner[rows[block] - first]
        middle = rank[items[asked - first]]
        group = middle >= seen
        ends = np.where(group, seen, 0), np.where(group, num_items, seen)
        drawn = np.full(len(asked), -1)
        place, key = asked - begins[low + user], events.user_keys[low + user]
        for draw in range(_DRAWS):
            left = np.flatnonzero(drawn < 0)
            if not left.size:
                break
            width = WINDOW << draw // 4 if matched else num_items
            lowest = np.maximum(ends[0][left], middle[left] - width)
            highest = np.minimum(ends[1][left], middle[left] + width + 1)
            value = hash64("table negative", seed, key[left], place[left], draw)
            offset = (value % (highest - lowest).astype(np.uint64)).astype(np.int64)
            item = by_rank[lowest + offset]
            pair = user[left] * num_items + item
            at = np.minimum(np.searchsorted(has, pair), len(has) - 1)
            drawn[left] = np.where(has[at] == pair, -1, item)
        for k in np.flatnonzero(drawn < 0):  # the user has nearly every item
            own = slice(*np.searchsorted(has, np.array([0, 1]) * num_items + user[k] * num_items))
            free = np.setdiff1d(np.arange(num_items), has[own] - user[k] * num_items)
            if not free.size:
                raise ValueError(
                    "a user has every item, so no negative is left: set "
                    "config.data.table.ask=next, or take a larger table"
                )
            near = free[np.argsort(np.abs(rank[free] - middle[k]))][
                : 2 * WINDOW if matched else None
            ]
            drawn[k] = near[int(hash64("table negative", seed, key[k], place[k])) % len(near)]
        negatives[block] = drawn
    return negatives
