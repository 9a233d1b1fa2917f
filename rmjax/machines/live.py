"""A live stream: items come one, seven or a thousand at a time; only full segments are committed to the memory."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.machines.scan import memorize
from rmjax.types import Array, Memory, MemoryMachine, Params


@flax.struct.dataclass
class LiveStream:
    memory: Memory  # of all full segments
    tail: Array  # i32 [B, N] items that do not fill a segment yet
    tail_len: Array  # i32 [B] how many of them are there, < N


def open_stream(
    machine: MemoryMachine, params: Params, batch_size: int, segment_length: int
) -> LiveStream:
    """An empty stream for each of `batch_size` rows."""
    empty = jnp.zeros((batch_size, segment_length), jnp.int32)
    return LiveStream(
        machine.init_memory(params, batch_size), empty, jnp.zeros(batch_size, jnp.int32)
    )


def feed(
    machine: MemoryMachine,
    params: Params,
    stream: LiveStream,
    items: Array,
    mask: Array | None = None,
) -> LiveStream:
    """Appends items i32 [B, n] (mask bool [B, n], default all) and commits the segments that are now full."""
    batch, length = stream.tail.shape
    if items.ndim != 2 or items.shape[0] != batch:
        raise ValueError(
            f"feed wants items [B, n] with B = {batch} rows as the stream was opened, got {items.shape}"
        )
    if mask is None:
        mask = jnp.ones(items.shape, bool)
    count = items.shape[1]
    room = -(-(length + count) // length) * length
    # Line up behind the tail, without gaps; index == room is dropped.
    place = jnp.where(mask, stream.tail_len[:, None] + jnp.cumsum(mask, 1) - 1, room)
    held = jnp.pad(stream.tail, ((0, 0), (0, room - length)))
    held = jax.vmap(lambda h, p, x: h.at[p].set(x, mode="drop"))(held, place, items)
    total = stream.tail_len + mask.sum(1)
    full = total // length
    segments = held.reshape(batch, -1, length)
    whole = jnp.broadcast_to(
        (jnp.arange(segments.shape[1]) < full[:, None])[..., None], segments.shape
    )
    most = (length - 1 + count) // length  # segments that can have filled up
    memory = stream.memory
    if most:
        memory = memorize(machine, params, segments[:, :most], whole[:, :most], memory).memory
    tail = jnp.take_along_axis(
        segments, jnp.minimum(full, segments.shape[1] - 1)[:, None, None], 1
    )[:, 0]
    return LiveStream(memory, tail, total - full * length)


def current_memory(machine: MemoryMachine, params: Params, stream: LiveStream) -> Memory:
    """The memory of every item so far, to read from: the tail is written, but not committed."""
    mask = jnp.arange(stream.tail.shape[1]) < stream.tail_len[:, None]
    return memorize(
        machine, params, stream.tail[:, None], mask[:, None], memory=stream.memory
    ).memory
