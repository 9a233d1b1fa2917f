"""Rules without a model that rank the next item: popularity, recency, co-occurrence, nearest id.

A source of clicks gives their ranks as `Source.references`. All functions take flat arrays and use
neither [n, V] scores nor loops over questions, so logs of tens of millions of events are fine.

Ranks follow the rule of `rmjax.reason.ranking.ranks`: 1 is the best, and equal scores share the
mean of their ranks. Items about which a rule knows nothing have equal scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

PAIRS = 2**22  # (question, event) pairs that are held at once


class Log(NamedTuple):
    """The events of all users."""

    start: np.ndarray  # i64 [users + 1], user u has the events start[u] .. start[u + 1] - 1
    item: np.ndarray  # i [events], each user's items in the order of time
    train: np.ndarray  # bool [events], the events of the training part, which alone are counted
    num_items: int  # V


class Asked(NamedTuple):
    """The questions of n examples. An entry that is not asked may hold zeros."""

    user: np.ndarray  # i64 [n]
    before: np.ndarray  # i64 [n, Q], number of the user's events before the question
    target: np.ndarray  # i [n, Q], the item that comes next
    cut: np.ndarray | None = None  # i64 [n], oldest events that are left out; None: 0


class _Flat(NamedTuple):
    """All questions in one axis, m = n Q."""

    first: np.ndarray  # i64 [m], the user's first event
    end: np.ndarray  # i64 [m], the event after the last one that the question knows
    target: np.ndarray  # i64 [m]
    last: np.ndarray  # i64 [m], the last item before the question; -1: none
    cut: np.ndarray  # i64 [m], the first event whose item counts as seen


_Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (questions, items) [p] -> scores [p]


def references(log: Log, asked: Asked, exclude_seen: bool = False) -> dict[str, np.ndarray]:
    """The ranks of all targets by four rules.

    - popularity: the number of events of an item in the training part.
    - most recent: the user's items, the latest first.
    - co-occurrence: how often an item directly follows the last item in the training part.
    - nearest id: minus the distance between the numbers of an item and of the last item.

    Args:
      log: the events.
      asked: the questions.
      exclude_seen: the user's earlier items do not compete with the target, as in
        `Questions.exclude_seen`. An item that occurs only before `Asked.cut` competes.

    Returns:
      {name of the rule: f64 [n, Q]}.
    """
    first = np.broadcast_to(log.start[asked.user][:, None], asked.target.shape).ravel()
    end = first + asked.before.ravel()
    last = np.where(end > first, log.item[np.maximum(end - 1, 0)], -1)
    cut = first if asked.cut is None else first + np.repeat(asked.cut, asked.target.shape[1])
    flat = _Flat(first, end, asked.target.astype(np.int64).ravel(), last.astype(np.int64), cut)
    following = _following(log)
    ranks = {
        name: _competing(log, flat, following, *rule(log, flat), exclude_seen)
        for name, rule in (
            ("popularity", _popularity),
            ("co-occurrence", _cooccurrence),
            ("nearest id", _nearest),
        )
    }
    ranks["most recent"] = _recent(log, flat, following, exclude_seen)
    names = ("popularity", "most recent", "co-occurrence", "nearest id")
    return {name: ranks[name].reshape(asked.target.shape) for name in names}


def _popularity(log: Log, flat: _Flat) -> tuple[np.ndarray, _Score]:
    """Ranks [m] among all items, and the scores."""
    count = np.bincount(log.item[log.train], minlength=log.num_items)
    rising, own = np.sort(count), count[flat.target]
    above = np.searchsorted(rising, own, "right")
    equal = above - np.searchsorted(rising, own, "left") - 1
    return 1 + log.num_items - above + equal / 2, lambda question, item: count[item]


def _cooccurrence(log: Log, flat: _Flat) -> tuple[np.ndarray, _Score]:
    """Ranks [m] among all items, and the scores."""
    size = log.num_items
    next_is_same_user = np.ones(len(log.item), bool)
    next_is_same_user[log.start[1:][log.start[1:] > 0] - 1] = False
    begin = np.flatnonzero(next_is_same_user & log.train)
    begin = begin[log.train[begin + 1]]
    pair = log.item[begin].astype(np.int64) * size + log.item[begin + 1]
    pair, count = np.unique(pair, return_counts=True)

    def score(question: np.ndarray, item: np.ndarray) -> np.ndarray:
        if not len(pair):
            return np.zeros(len(item), np.int64)
        wanted = flat.last[question] * size + item  # negative where there is no last item
        place = np.minimum(np.searchsorted(pair, wanted), len(pair) - 1)
        return np.where(pair[place] == wanted, count[place], 0)

    # Pairs by their first item, and then by falling count: a rank is a difference of two places.
    most = int(count.max(initial=0)) + 1
    order = np.sort(pair // size * most + most - 1 - count)
    own = score(np.arange(len(flat.target)), flat.target)
    row, place = flat.last * most, flat.last * most + most - 1 - own
    better = np.searchsorted(order, place, "left") - np.searchsorted(order, row, "left")
    known = np.searchsorted(order, place, "right") - np.searchsorted(order, place, "left") - 1
    equal = np.where(own > 0, known, size - 1 - better)
    return 1 + better + equal / 2, score


def _nearest(log: Log, flat: _Flat) -> tuple[np.ndarray, _Score]:
    """Ranks [m] among all items, and the scores."""
    last, size = flat.last, log.num_items
    distance = np.abs(flat.target - last)
    nearer = np.minimum(size - 1, last + distance - 1) - np.maximum(0, last - distance + 1) + 1
    other = 2 * last - flat.target  # as far away, on the other side
    equal = (distance > 0) & (other >= 0) & (other < size)
    rank = 1 + np.where(distance > 0, nearer, 0) + equal / 2
    rank = np.where(last < 0, (size + 1) / 2, rank)
    return rank, lambda question, item: -np.abs(item - last[question])


def _recent(log: Log, flat: _Flat, following: np.ndarray, exclude_seen: bool) -> np.ndarray:
    """Ranks [m] by the last occurrence; all items that the user never had are equal."""
    ranks = np.empty(len(flat.target))
    for part, question, event in _seen(flat, following):
        count = lambda which, q=question, p=part: np.bincount(q[which], minlength=p.stop - p.start)
        own = log.item[event] == flat.target[part][question]
        latest = np.full(part.stop - part.start, -1)
        latest[question[own]] = event[own]
        later, known = event > latest[question], latest >= 0
        fresh = log.num_items - 1 - count(later)  # competitors of an item that the user never had
        if exclude_seen:
            later &= event < flat.cut[part][question]
        ranks[part] = 1 + count(later) + np.where(known, 0, fresh / 2)
    return ranks


def _following(log: Log) -> np.ndarray:
    """For each event the user's next event with the same item, i64; a large number if none is."""
    user = np.repeat(np.arange(len(log.start) - 1), np.diff(log.start))
    key = user * log.num_items + log.item
    order = np.argsort(key, kind="stable")
    again = key[order[1:]] == key[order[:-1]]
    following = np.full(len(key), np.iinfo(np.int64).max)
    following[order[:-1][again]] = order[1:][again]
    return following


def _seen(flat: _Flat, following: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The last events of all items that a user has seen before a question.

    Yields:
      Some questions, about `PAIRS` pairs of them and their events at a time; and for each pair the
      place of the question among these, and the event.
    """
    sizes = flat.end - flat.first
    total, start = np.cumsum(sizes), 0
    while start < len(sizes):
        room = PAIRS + (total[start - 1] if start else 0)
        stop = max(start + 1, int(np.searchsorted(total, room, "right")))
        size = sizes[start:stop]
        question = np.repeat(np.arange(stop - start), size)
        place = np.arange(len(question)) - np.repeat(np.cumsum(size) - size, size)
        event = place + flat.first[start:stop][question]
        kept = following[event] >= flat.end[start:stop][question]
        yield slice(start, stop), question[kept], event[kept]
        start = stop


def _competing(
    log: Log,
    flat: _Flat,
    following: np.ndarray,
    ranks: np.ndarray,
    score: _Score,
    exclude_seen: bool,
) -> np.ndarray:
    """The ranks [m] among the items that compete, from the ranks among all items."""
    if not exclude_seen:
        return ranks
    ranks = ranks.astype(np.float64)
    for part, question, event in _seen(flat, following):
        seen = event >= flat.cut[part][question]
        question, event = question[seen], event[seen]
        item, number = log.item[event].astype(np.int64), question + part.start
        target = flat.target[number]
        value, own = score(number, item), score(number, target)
        lost = (value > own) + 0.5 * (value == own)
        ranks[part] -= np.bincount(
            question, np.where(item == target, 0.0, lost), minlength=part.stop - part.start
        )
    return ranks
