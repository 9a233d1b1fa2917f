"""A live stream: items arrive in chunks of any length; only full segments are written for good."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.machines.scan import memorize
from rmjax.types import Array, Memory, MemoryMachine, Params


@flax.struct.dataclass
class LiveStream:
    """The state of B live streams with segments of N items."""

    memory: Memory  # of all full segments
    tail: Array  # i32 [B, N] items that do not fill a segment yet; the last place: see `last_item`
    tail_len: Array  # i32 [B] number of items in the tail, < N


def open_stream(
    machine: MemoryMachine, params: Params, batch_size: int, segment_length: int
) -> LiveStream:
    """Opens empty streams.

    Args:
      machine: the machine that will write them.
      params: of `machine.init`.
      batch_size: number of streams, B.
      segment_length: items of a segment, N.

    Returns:
      B streams without any item.
    """
    empty = jnp.zeros((batch_size, segment_length), jnp.int32)
    no_items = jnp.zeros(batch_size, jnp.int32)
    return LiveStream(machine.init_memory(params, batch_size), empty, no_items)


def feed(
    machine: MemoryMachine,
    params: Params,
    stream: LiveStream,
    items: Array,
    mask: Array | None = None,
) -> LiveStream:
    """Appends items to live streams, and writes the segments that are full now.

    Args:
      machine: the machine that writes.
      params: of `machine.init`.
      stream: B live streams.
      items: i32 [B, n], any number of new items.
      mask: bool [B, n], true where an item is. None: everywhere.

    Returns:
      The streams after these items.

    Raises:
      ValueError: `items` does not have one row for each stream.
    """
    batch, length = stream.tail.shape
    if items.ndim != 2 or items.shape[0] != batch:
        raise ValueError(
            f"feed needs items [B, n] with B = {batch}, as in open_stream; got {items.shape}"
        )
    if mask is None:
        mask = jnp.ones(items.shape, bool)
    count = items.shape[1]
    room = -(-(length + count) // length) * length
    # New items line up behind the tail without gaps. The scatter drops masked items, at `room`.
    place = jnp.where(mask, stream.tail_len[:, None] + jnp.cumsum(mask, 1) - 1, room)
    held = jnp.pad(stream.tail, ((0, 0), (0, room - length)))
    held = jax.vmap(lambda h, p, x: h.at[p].set(x, mode="drop"))(held, place, items)
    total = stream.tail_len + mask.sum(1)
    full = total // length  # i32 [B] full segments
    segments = held.reshape(batch, -1, length)
    is_full = jnp.arange(segments.shape[1]) < full[:, None]
    written = jnp.broadcast_to(is_full[..., None], segments.shape)
    most = (length - 1 + count) // length  # the most segments that these items can fill
    memory = stream.memory
    if most:
        memory = memorize(machine, params, segments[:, :most], written[:, :most], memory).memory
    last = jnp.minimum(full, segments.shape[1] - 1)[:, None, None]
    tail = jnp.take_along_axis(segments, last, 1)[:, 0]
    # A tail has at most N - 1 items, so its last place is free: it keeps the stream's last item.
    newest = jnp.take_along_axis(held, jnp.maximum(total, 1)[:, None] - 1, 1)[:, 0]
    tail = tail.at[:, -1].set(jnp.where(mask.any(1), newest, stream.tail[:, -1]))
    return LiveStream(memory, tail, total - full * length)


def last_item(stream: LiveStream) -> Array:
    """Returns the last item of each stream, i32 [B]; -1 for streams without any item."""
    some = (stream.tail_len > 0) | (stream.memory.segments > 0)
    return jnp.where(some, stream.tail[:, -1], -1)


def current_memory(machine: MemoryMachine, params: Params, stream: LiveStream) -> Memory:
    """Returns the memory of every item so far, for reading.

    The tail is written into the returned memory only; the stream itself does not change.

    Args:
      machine: the machine that writes.
      params: of `machine.init`.
      stream: B live streams.

    Returns:
      A memory of B streams.
    """
    mask = jnp.arange(stream.tail.shape[1]) < stream.tail_len[:, None]
    tail, mask = stream.tail[:, None], mask[:, None]
    return memorize(machine, params, tail, mask, memory=stream.memory).memory
