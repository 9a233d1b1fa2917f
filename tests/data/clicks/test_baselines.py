"""Ranks of the baselines against scores of all items, counted one by one in plain Python."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from rmjax.data.clicks import baselines
from rmjax.data.clicks.baselines import Asked, Log

ITEMS = 12


def world(seed: int) -> tuple[Log, Asked]:
    """Users with 0 to 9 events, of which some are trained on; three questions of each user."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 10, 30)
    start = np.concatenate([[0], np.cumsum(sizes)])
    item = rng.integers(0, ITEMS, start[-1]).astype(np.int32)
    log = Log(start, item, rng.random(start[-1]) < 0.7, ITEMS)
    before = np.floor(rng.random((30, 3)) * (sizes[:, None] + 1)).astype(np.int64)
    return log, Asked(np.arange(30), before, rng.integers(0, ITEMS, (30, 3)).astype(np.int32))


def scores(log: Log, history: list[int]) -> dict[str, list[float]]:
    """The scores of all items by each rule, after a history."""
    count, pairs = collections.Counter(), collections.Counter()
    for u in range(len(log.start) - 1):
        events = range(log.start[u], log.start[u + 1])
        count.update(int(log.item[e]) for e in events if log.train[e])
        for a, b in zip(events, events[1:], strict=False):
            if log.train[a] and log.train[b]:
                pairs[int(log.item[a]), int(log.item[b])] += 1
    every, last = range(ITEMS), history[-1] if history else None
    age = {item: place for place, item in enumerate(history)}
    return {
        "popularity": [count[v] for v in every],
        "most recent": [age.get(v, -1) for v in every],
        "co-occurrence": [pairs[last, v] for v in every],
        "nearest id": [0 if last is None else -abs(v - last) for v in every],
    }


@pytest.mark.parametrize("exclude_seen, cut", [(False, 0), (True, 0), (False, 3), (True, 3)])
@pytest.mark.parametrize("pairs", [3, 2**22])
def test_ranks_are_those_of_all_scores(monkeypatch, exclude_seen, cut, pairs):
    """With a cut, the oldest items of a user compete, also where seen items are left out."""
    monkeypatch.setattr(baselines, "PAIRS", pairs)
    log, asked = world(0)
    asked = asked._replace(cut=np.full(30, cut)) if cut else asked
    ranks = baselines.references(log, asked, exclude_seen)
    assert list(ranks) == ["popularity", "most recent", "co-occurrence", "nearest id"]
    for user in range(30):
        for q in range(3):
            begin = log.start[user]
            history = log.item[begin : begin + asked.before[user, q]].tolist()
            target = int(asked.target[user, q])
            out = set(history[cut:]) - {target} if exclude_seen else set()
            for name, score in scores(log, history).items():
                others = [s for v, s in enumerate(score) if v != target and v not in out]
                better = sum(s > score[target] for s in others)
                equal = sum(s == score[target] for s in others)
                assert ranks[name][user, q] == 1 + better + equal / 2, (name, history, target)


def test_a_log_without_training_events_ranks_all_items_alike():
    log, asked = world(1)
    ranks = baselines.references(log._replace(train=log.train & False), asked)
    assert (ranks["popularity"] == (ITEMS + 1) / 2).all()
    assert (ranks["co-occurrence"] == (ITEMS + 1) / 2).all()


@pytest.mark.slow
def test_twenty_million_events_take_a_minute():
    rng, users = np.random.default_rng(0), 200_000
    start = np.arange(users + 1) * 100
    item = (rng.random(start[-1]) ** 3 * 1_000_000).astype(np.int32)
    log = Log(start, item, np.ones(len(item), bool), 1_000_000)
    target = rng.integers(0, 1_000_000, (users, 1))
    asked = Asked(np.arange(users), np.full((users, 1), 99), target)
    ranks = baselines.references(log, asked, True)
    assert all(np.isfinite(rank).all() for rank in ranks.values())
