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
from rmjax.serve.checks import of_items
from rmjax.tasks.answers import questions_only
from rmjax.types import Array, Params, Task

Id = int | str
_MANY = 256  # most histories of one call of the compiled program
_CELLS = 1 << 22  # most items of the histories of one call, and of the items that are left out


class Recommended(NamedTuple):
    """One recommended item."""

    item: Id  # as the data call it
    score: float  # larger is better; comparable for one history only


class Best(NamedTuple):
    """The best items of n histories."""

    scores: np.ndarray  # f32 [n, k], falling; -inf where fewer items are left
    items: np.ndarray  # i32 [n, k], indices of items; -1 where fewer items are left


class Names:
    """The ids of items, in both directions.

    Args:
      ids: what the data call the items, [num_items] integers or strings.
    """

    def __init__(self, ids: np.ndarray):
        self.ids = ids
        self._index: dict[Hashable, int] | None = None

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


class Recommender:
    """Recommends items to any number of histories at once. Threads may share it.

    Args:
      task: of a model that ranks items.
      params: of the task.
      names: the ids of the items.

    Attributes:
      num_items: number of items that the model ranks.
      exclude_seen: whether items of a stream did not compete when the model was evaluated.
      names: as above.

    Raises:
      ValueError: the model answers other questions.
    """

    def __init__(self, task: Task, params: Params, names: Names):
        task = of_items(task)
        if task.answers.ranking is None:
            answer = task.answers.questions.answer
            raise ValueError(
                f"this model was trained to answer {answer!r}, so it cannot recommend: train one "
                "with --config=configs/clicks.py"
            )
        self._task, self._params, self._length = task, params, task.segment_length
        self.num_items = task.answers.ranking.num_items
        self.exclude_seen = task.answers.ranking.exclude_seen
        self.names = names
        self._best: Callable[..., tuple[Array, Array]] = jax.jit(self._best_of, static_argnames="k")

    def named(self, best: Best) -> list[list[Recommended]]:
        """The best items with the ids of the data; missing ones are left out."""
        ids = self.names.ids
        return [
            [Recommended(ids[i], float(s)) for i, s in zip(*row, strict=True) if i >= 0]
            for row in zip(best.items.tolist(), best.scores.tolist(), strict=True)
        ]

    def best(
        self,
        histories: Sequence[np.ndarray],
        k: int = 10,
        exclude_seen: bool | None = None,
        done: Callable[[int], object] = lambda count: None,
        seen: Sequence[np.ndarray] | None = None,
    ) -> Best:
        """Ranks all items for each history.

        Histories of a similar length are ranked together. A history is padded to a number of
        segments that is a power of two, or to the longest one, so few programs are compiled. The
        items that are left out are padded to the length of the history, or to a power of two.

        Args:
          histories: n arrays i32 of indices of items, the oldest first; they may be empty.
          k: how many items.
          exclude_seen: whether items that were seen are left out; None: as in the evaluation.
          done: called after each part with the number of its histories.
          seen: n arrays i32 of the items that were seen; None: those of the histories.

        Returns:
          The best items of each history.

        Raises:
          ValueError: k is below 1 or above the number of items.
        """
        if not 1 <= k <= self.num_items:
            raise ValueError(f"k = {k}: must be from 1 to the number of items, {self.num_items}")
        n, exclude = len(histories), self.exclude_seen if exclude_seen is None else exclude_seen
        shown = histories if seen is None else seen
        out = [np.unique(items) if exclude else np.empty(0, np.int32) for items in shown]
        best = Best(np.empty((n, k), np.float32), np.empty((n, k), np.int32))
        for rows, size, width in _parts(_lengths(histories), _lengths(out), self._length):
            many = 1 << (len(rows) - 1).bit_length()
            items, length = np.zeros((many, size), np.int32), np.zeros(many, np.int32)
            left_out = np.full((many, width), -1, np.int32)
            for place, row in enumerate(rows):
                length[place] = len(histories[row])
                items[place, : length[place]] = histories[row]
                left_out[place, : len(out[row])] = out[row]
            scores, ids = self._best(self._params, items, length, left_out, k=k)
            best.scores[rows] = np.asarray(scores)[: len(rows)]
            best.items[rows] = np.asarray(ids)[: len(rows)]
            done(len(rows))
        return best

    def _best_of(
        self, params: Params, items: Array, length: Array, left_out: Array, *, k: int
    ) -> tuple[Array, Array]:
        """Scores and indices [B, k] of the best items after items [B, L], of length [B].

        The items left_out [B, W] do not compete; -1 is padding.
        """
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
        asked = batch.query, batch.query_mask
        scores, ids = self._task.top_k(params, memory, *asked, k, left_out)
        return scores[:, 0], ids[:, 0]


def _lengths(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([len(array) for array in arrays], np.int64)


def _powers(counts: np.ndarray) -> np.ndarray:
    """The least power of two that is not below each count, which is at least 1."""
    powers: np.ndarray = 1 << np.ceil(np.log2(counts)).astype(np.int64)
    return powers


def _parts(
    lengths: np.ndarray, left_out: np.ndarray, segment_length: int
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Groups histories of similar sizes, at most `_MANY` of them and about `_CELLS` items.

    Args:
      lengths: i64 [n], of the histories.
      left_out: i64 [n], numbers of items that are left out.
      segment_length: N.

    Yields:
      The rows of a group, and the sizes that their histories and the items left out are padded to.
    """
    segments = np.maximum(1, -(-lengths // segment_length))
    size = np.minimum(_powers(segments), segments.max(initial=1)) * segment_length
    width = np.where(left_out <= size, size, _powers(np.maximum(left_out, 1)))
    for one, other in np.unique(np.stack([size, width], 1), axis=0).tolist():
        rows = np.flatnonzero((size == one) & (width == other))
        many = min(_MANY, 1 << max(1, _CELLS // other).bit_length() - 1)
        for first in range(0, len(rows), many):
            yield rows[first : first + many], one, other
