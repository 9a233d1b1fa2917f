"""The best next items of users, in the ids of their own data.

    python -m rmjax.recommend --workdir=runs/shop --events=events.csv --out=recs.parquet --k=10

The model must rank items (`configs/clicks.py`). Items that it does not know are left out of
histories: no row of its table was learned for them. They are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.machines import memorize
from rmjax.serve.store import of_items
from rmjax.tasks.answers import questions_only
from rmjax.types import Array, Params, Task

Id = int | str
_MANY = 256  # histories of one call of the compiled program


class Recommended(NamedTuple):
    """One recommended item."""

    item: Id  # as the data call it
    score: float  # larger is better; comparable for one history only


class Best(NamedTuple):
    """The best items of n histories."""

    scores: np.ndarray  # f32 [n, k], falling; -inf where fewer items are left
    items: np.ndarray  # i32 [n, k], indices of items; -1 where fewer items are left


class Recommender:
    """Recommends items to any number of histories at once. Threads may share it.

    Args:
      task: of a model that ranks items.
      params: of the task.
      ids: what the data call the items, [num_items] integers or strings; None: their indices.

    Attributes:
      num_items: number of items that the model ranks.
      ids: as above.

    Raises:
      ValueError: the model answers other questions.
    """

    def __init__(self, task: Task, params: Params, ids: np.ndarray | None = None):
        task = of_items(task)
        if task.answers.ranking is None:
            answer = task.answers.questions.answer
            raise ValueError(
                f"this model was trained to answer {answer!r}, so it cannot recommend: train one "
                "with --config=configs/clicks.py"
            )
        self._task, self._params, self._length = task, params, task.segment_length
        self.num_items = task.answers.ranking.num_items
        self.ids = np.arange(self.num_items) if ids is None else ids
        self._index: dict[Hashable, int] | None = None
        self._best: Callable[..., tuple[Array, Array]] = jax.jit(self._best_of, static_argnames="k")

    def indices(self, ids: Sequence[Id]) -> np.ndarray:
        """Finds items by their ids.

        Args:
          ids: as the data call the items.

        Returns:
          The index of each item, i32; -1 for an item that the model does not know.
        """
        if self._index is None:  # takes a second for a million items
            self._index = {one: k for k, one in enumerate(self.ids.tolist())}
        plain = np.asarray(ids, object).tolist()
        return np.array([self._index.get(one, -1) for one in plain], np.int32)

    def named(self, best: Best) -> list[list[Recommended]]:
        """The best items with the ids of the data; missing ones are left out."""
        return [
            [Recommended(self.ids[i], float(s)) for i, s in zip(*row, strict=True) if i >= 0]
            for row in zip(best.items.tolist(), best.scores.tolist(), strict=True)
        ]

    def best(
        self,
        histories: Sequence[np.ndarray],
        k: int = 10,
        exclude_seen: bool = True,
        done: Callable[[int], object] = lambda count: None,
    ) -> Best:
        """Ranks all items for each history.

        Histories of a similar length are ranked together. A history is padded to a number of
        segments that is a power of two, or to the longest one, so few programs are compiled.

        Args:
          histories: n arrays i32 of indices of items, the oldest first; they may be empty.
          k: how many items.
          exclude_seen: whether the items of a history are left out.
          done: called after each part with the number of its histories.

        Returns:
          The best items of each history.

        Raises:
          ValueError: k is below 1 or above the number of items.
        """
        if not 1 <= k <= self.num_items:
            raise ValueError(f"k = {k}: must be from 1 to the number of items, {self.num_items}")
        n = len(histories)
        best = Best(np.empty((n, k), np.float32), np.empty((n, k), np.int32))
        for rows, segments in _parts([len(history) for history in histories], self._length):
            size = min(_MANY, 1 << (len(rows) - 1).bit_length())
            items = np.zeros((size, segments * self._length), np.int32)
            length = np.zeros(size, np.int32)
            for place, row in enumerate(rows):
                length[place] = len(histories[row])
                items[place, : length[place]] = histories[row]
            scores, ids = self._best(self._params, items, length, exclude_seen, k=k)
            best.scores[rows] = np.asarray(scores)[: len(rows)]
            best.items[rows] = np.asarray(ids)[: len(rows)]
            done(len(rows))
        return best

    def _best_of(
        self, params: Params, items: Array, length: Array, exclude_seen: Array, *, k: int
    ) -> tuple[Array, Array]:
        """Scores and indices [B, k] of the best items after items [B, L], of length [B]."""
        mask = jnp.arange(items.shape[1]) < length[:, None]
        shape = len(items), -1, self._length
        one = jnp.zeros((len(items), 1), jnp.int32)
        batch = dataclasses.replace(
            questions_only(one, one == 0),
            items=items.reshape(shape),
            item_mask=mask.reshape(shape),
            items_before=length[:, None],
        )
        batch = self._task.answers.asked(batch)
        machine = self._task.machine
        memory = memorize(machine, params["machine"], batch.items, batch.item_mask).memory
        seen = jnp.where(mask & exclude_seen, items, -1)
        asked = batch.query, batch.query_mask
        scores, ids = self._task.top_k(params, memory, *asked, k, seen)
        return scores[:, 0], ids[:, 0]


def _parts(lengths: Sequence[int], segment_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the rows of at most `_MANY` histories, and the segments that all of them fit in."""
    count = np.maximum(1, -(-np.asarray(lengths, np.int64) // segment_length))
    powers = 1 << np.ceil(np.log2(count)).astype(np.int64)
    sizes = np.minimum(powers, count.max(initial=1))
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        for first in range(0, len(rows), _MANY):
            yield rows[first : first + _MANY], int(size)
