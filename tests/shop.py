"""A source of next-item questions on the made-up shop log, for tests."""

from __future__ import annotations

import sys

import numpy as np

from rmjax.data.clicks.baselines import Asked, Log, references
from rmjax.data.source import Questions, Source
from tests import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from shop_log import Shop, draw  # noqa: E402

sys.path.pop(0)


class ShopSource(Source):
    """The last event of a user is 'test', the one before 'valid', and up to Q earlier ones train.

    Args:
      shop: the sizes of the log.
      queries: Q, training questions of a stream; they are spread evenly over it.
      exclude_seen: see `Questions`.
    """

    positions_at_end = False

    def __init__(self, shop: Shop, queries: int = 4, exclude_seen: bool = False):
        user, item, _, _ = draw(shop)
        self.start = np.searchsorted(user, np.arange(shop.users + 1))
        self.item, self.sizes = item.astype(np.int32), np.diff(self.start)
        self.num_items, self.max_items, self.num_queries = shop.items, shop.longest, queries
        self.questions = Questions(
            "kind", kinds=1, answer="item", metric="ndcg@10", exclude_seen=exclude_seen
        )
        place = np.arange(len(user)) - self.start[user]
        self.train = place < self.sizes[user] - 2
        self.popularity = np.bincount(item[self.train], minlength=shop.items)

    def size(self, split):
        return len(self.sizes)

    def _before(self, split, users):
        """Events before each question, and which questions exist."""
        last = self.sizes[users][:, None] - {"train": 3, "valid": 2, "test": 1}[split]
        if split != "train":
            mask = np.arange(self.num_queries) < np.ones((len(users), 1), int)
            return np.where(mask, last, 0), mask
        steps = np.arange(1, self.num_queries + 1) / self.num_queries
        before = np.ceil(last * steps).astype(np.int64)
        return before, np.diff(before, prepend=0, axis=1) > 0

    def fetch(self, split, indices):
        before, mask = self._before(split, indices)
        place = self.start[indices][:, None] + before
        columns = np.arange(self.max_items)
        length = before.max(1)
        known = columns < length[:, None]
        event = np.minimum(self.start[indices][:, None] + columns, len(self.item) - 1)
        return {
            "items": np.where(known, self.item[event], 0),
            "length": length.astype(np.int32),
            "query": np.zeros(mask.shape, np.int32),
            "query_mask": mask,
            "target": np.where(mask, self.item[place], 0),
            "example_id": indices.astype(np.int32),
            "position": np.where(mask, before, 0).astype(np.int32),
        }

    def groups(self, split):
        long = np.broadcast_to((self.sizes >= 40)[:, None], (len(self.sizes), self.num_queries))
        return {"under 40": ~long, "40 or more": long}

    def references(self, split):
        every = np.arange(len(self.sizes))
        before, mask = self._before(split, every)
        target = self.item[self.start[every][:, None] + before]
        log = Log(self.start, self.item, self.train, self.num_items)
        return references(log, Asked(every, before, target), self.questions.exclude_seen)
