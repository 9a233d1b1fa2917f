"""A queue of rows with a fixed capacity, the newest row at the end.

The streams of a batch fill their queues independently.
"""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from rmjax.types import Array


@flax.struct.dataclass
class Queue:
    """The queues of B streams."""

    rows: Array  # f32 [B, M, D], of which the last `length` are valid
    length: Array  # i32 [B]

    @property
    def mask(self) -> Array:
        """Bool [B, M], true at valid rows."""
        size = self.rows.shape[1]
        return jnp.arange(size) >= size - self.length[:, None]


def empty(batch_size: int, size: int, dim: int, dtype: jnp.dtype = jnp.float32) -> Queue:
    """Empty queues.

    Args:
      batch_size: B.
      size: M, the capacity.
      dim: D.
      dtype: of the rows.

    Returns:
      The queues.
    """
    return Queue(jnp.zeros((batch_size, size, dim), dtype), jnp.zeros(batch_size, jnp.int32))


def push(queue: Queue, rows: Array, mask: Array) -> tuple[Queue, Array, Array]:
    """Appends valid rows in their order.

    Args:
      queue: of B streams.
      rows: [B, N, D].
      mask: bool [B, N], true at valid rows.

    Returns:
      The queue; the rows that left it, [B, N, D], the newest at the end; and their mask [B, N].
    """
    rows = jnp.where(mask[..., None], rows, 0.0)  # so no garbage gets into the queue
    every = jnp.concatenate([queue.rows, rows.astype(queue.rows.dtype)], 1)
    valid = jnp.concatenate([queue.mask, mask], 1)
    order = jnp.argsort(valid, 1, stable=True)  # invalid rows first, then the oldest
    sort = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)
    every, valid = sort(every), sort(valid)
    fallen = rows.shape[1]
    length = jnp.minimum(valid.sum(1, dtype=jnp.int32), queue.rows.shape[1])
    # A queue without a new row stays bit for bit, its invalid rows included.
    kept = jnp.where(mask.any(1)[:, None, None], every[:, fallen:], queue.rows)
    return Queue(kept, length), every[:, :fallen], valid[:, :fallen]


def reset(queue: Queue, where: Array) -> Queue:
    """Empties the queues of the streams where `where` [B] is true."""
    return queue.replace(length=jnp.where(where, 0, queue.length))  # type: ignore[attr-defined]
