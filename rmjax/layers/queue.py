"""First in, first out: rows of a fixed-length memory, the newest at its end. Every stream fills up at its own pace."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from rmjax.types import Array


@flax.struct.dataclass
class Queue:
    rows: Array  # f32 [B, M, D]; of these the last `length` are there
    length: Array  # i32 [B]

    @property
    def mask(self) -> Array:
        """Bool [B, M]"""
        size = self.rows.shape[1]
        return jnp.arange(size) >= size - self.length[:, None]


def empty(batch_size: int, size: int, dim: int, dtype: jnp.dtype = jnp.float32) -> Queue:
    return Queue(jnp.zeros((batch_size, size, dim), dtype), jnp.zeros(batch_size, jnp.int32))


def push(queue: Queue, rows: Array, mask: Array) -> tuple[Queue, Array, Array]:
    """Appends the valid ones of rows [B, N, D], mask bool [B, N], in their order.

    -> the queue; what fell out of it [B, N, D] and its mask [B, N], the newest at the end.
    """
    every = jnp.concatenate([queue.rows, rows.astype(queue.rows.dtype)], 1)
    valid = jnp.concatenate([queue.mask, mask], 1)
    order = jnp.argsort(valid, 1, stable=True)  # what is not there comes first, then the oldest
    sort = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)
    every, valid = sort(every), sort(valid)
    fallen = rows.shape[1]
    length = jnp.minimum(valid.sum(1, dtype=jnp.int32), queue.rows.shape[1])
    # A queue that nothing comes into stays bit for bit, what is not there included.
    kept = jnp.where(mask.any(1)[:, None, None], every[:, fallen:], queue.rows)
    return Queue(kept, length), every[:, :fallen], valid[:, :fallen]


def reset(queue: Queue, where: Array) -> Queue:
    """Empties the streams where `where` [B] is true."""
    return queue.replace(length=jnp.where(where, 0, queue.length))  # type: ignore[attr-defined]
