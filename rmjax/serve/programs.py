"""The compiled functions of a model over rows of streams, and groups of requests for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.machines.live import LiveStream, current_memory, feed
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Array, Memory, Params

K = TypeVar("K")


class Programs:
    """The compiled functions of a model over the rows [b, ...] of b streams.

    Args:
      task: of the model.
      params: of the model.

    Attributes:
      feed: (rows, items i32 [b, n], mask) -> the rows after these items.
      answer: (rows, queries i32 [b, Q], mask) -> scores [b, Q, ...].
      rank: (rows, items to leave out i32 [b, E], mask, k=k) -> scores f32 and items i32 [b, k].
      remember: rows -> the memories of all items.
    """

    def __init__(self, task: Reasoning, params: Params):
        machine, params = task.machine, jax.device_put(params)

        @jax.jit
        def feed_rows(params: Params, rows: LiveStream, items: Array, mask: Array) -> LiveStream:
            return feed(machine, params["machine"], rows, items, mask)

        @jax.jit
        def answer_rows(params: Params, rows: LiveStream, query: Array, mask: Array) -> Array:
            memory = current_memory(machine, params["machine"], rows)
            return task.answer(params, memory, task.answers.asked_live(rows, query), mask)

        @functools.partial(jax.jit, static_argnames="k")
        def rank_rows(
            params: Params, rows: LiveStream, exclude: Array, mask: Array, *, k: int
        ) -> tuple[Array, Array]:
            memory = current_memory(machine, params["machine"], rows)
            query = task.answers.asked_live(rows, jnp.zeros((len(exclude), 1), jnp.int32))
            left_out = jnp.where(mask, exclude, -1)
            scores, ids = task.top_k(params, memory, query, query == query, k, left_out)
            return scores[:, 0], ids[:, 0]

        @jax.jit
        def remember_rows(params: Params, rows: LiveStream) -> Memory:
            return current_memory(machine, params["machine"], rows)

        bind: Callable[..., Any] = lambda function: functools.partial(function, params)
        self.feed: Callable[..., LiveStream] = bind(feed_rows)
        self.answer: Callable[..., Array] = bind(answer_rows)
        self.rank: Callable[..., tuple[Array, Array]] = bind(rank_rows)
        self.remember: Callable[[LiveStream], Memory] = bind(remember_rows)


def least(sizes: Sequence[int], count: int) -> int:
    """The smallest of rising sizes that `count` fits into."""
    return next(size for size in sizes if count <= size)


def grouped(
    requests: Mapping[K, np.ndarray], size_of: Callable[[np.ndarray], int], most: int
) -> Iterator[tuple[int, dict[K, np.ndarray]]]:
    """Groups requests that are padded to the same size.

    Args:
      requests: {key: ids [n]}.
      size_of: the size that ids are padded to.
      most: requests of a group.

    Yields:
      (size, requests), the shortest first.
    """
    by_size: dict[int, list[tuple[K, np.ndarray]]] = {}
    for key, ids in sorted(requests.items(), key=lambda request: len(request[1])):
        by_size.setdefault(size_of(ids), []).append((key, ids))
    for size, group in by_size.items():
        for first in range(0, len(group), most):
            yield size, dict(group[first : first + most])


def padded_ids(
    lists: Sequence[np.ndarray], batch: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pads lists of ids.

    Args:
      lists: at most `batch` lists of at most `width` ids.
      batch: number of rows.
      width: number of columns.

    Returns:
      Ids i32 [batch, width], and their mask.
    """
    ids, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
    for row, part in enumerate(lists):
        ids[row, : len(part)], mask[row, : len(part)] = part, True
    return ids, mask
