"""A source of next-item questions on the made-up shop log, for tests."""

from __future__ import annotations

import sys

import numpy as np

from rmjax.data.clicks.baselines import Asked, Log, references
from rmjax.data.source import Questions, Source
from tests import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import big_log  # noqa: E402, F401
import shop_log  # noqa: E402, F401
from shop_log import Shop, draw  # noqa: E402

sys.path.pop(0)


class ShopSource(Source):
    """The last event of a user is 'test', the one before 'valid', and all earlier ones train.

    Args:
      shop: the sizes of the log.
      queries: Q; a user with more training questions gets several examples.
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
        every = np.arange(shop.users)
        chunks = -(-(self.sizes - 3) // queries)  # of the training targets 1 .. size - 3
        self._users = {"train": np.repeat(every, chunks), "valid": every, "test": every}
        number = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        first = {"train": 1 + queries * number, "valid": self.sizes - 2, "test": self.sizes - 1}
        self._first = first

    def size(self, split):
        return len(self._users[split])

    def stream_id(self, split):
        return self._users[split]

    def _asked(self, split, indices):
        """Users, events before each question, and which questions exist."""
        users = self._users[split][indices]
        before = self._first[split][indices][:, None] + np.arange(self.num_queries)
        end = self.sizes[users] - 2 if split == "train" else self._first[split][indices] + 1
        mask = before < end[:, None]
        return users, np.where(mask, before, 0), mask

    def fetch(self, split, indices):
        users, before, mask = self._asked(split, indices)
        place = self.start[users][:, None] + before
        columns = np.arange(self.max_items)
        length = before.max(1)
        known = columns < length[:, None]
        event = np.minimum(self.start[users][:, None] + columns, len(self.item) - 1)
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
        sizes = self.sizes[self._users[split]][:, None]
        long = np.broadcast_to(sizes >= 40, (len(sizes), self.num_queries))
        return {"under 40": ~long, "40 or more": long}

    def references(self, split):
        users, before, _ = self._asked(split, np.arange(self.size(split)))
        target = self.item[self.start[users][:, None] + before]
        log = Log(self.start, self.item, self.train, self.num_items)
        return references(log, Asked(users, before, target), self.questions.exclude_seen)
