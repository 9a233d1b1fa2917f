"""A buffer as a memory: keeps the raw ids, and reads the mean of all of them, the last few, or both."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers.embeddings import embed, init_embed
from rmjax.reason import multihop
from rmjax.types import Array, Key, MemoryMachine, Params


@flax.struct.dataclass
class BufferMemory:
    items: Array  # i32 [B, L] a ring: item i of the stream lies at i % L
    count: Array  # i32 [B] items written so far
    dropped: Array  # i32 [B] of these, how many a full buffer has dropped (the oldest go first)
    segments: Array  # i32 [B] written so far


def make(
    num_items: int, *, dim: int = 64, buffer_length: int = 1000, recent: int = 20, pooled: bool = True, hops: int = 1
) -> MemoryMachine:
    """Keeps the last `buffer_length` ids. Slots are the features of the last `recent` items, oldest first, and, if
    `pooled`, the mean feature of all kept items; the read is multi-hop attention over these slots.

    recent = 0 reads the mean alone, pooled = False the last items alone.
    """
    if not 0 <= recent <= buffer_length:
        raise ValueError(f"recent must lie in 0..buffer_length = {buffer_length}, got {recent}")
    if not recent and not pooled:
        raise ValueError("recent = 0 and pooled = False leave nothing to read: set one of them")

    def init(key: Key) -> Params:
        a, b = jax.random.split(key)
        return {"embed": init_embed(a, num_items, dim), "reader": multihop.init(b, dim, dim, hops)}

    def init_memory(params: Params, batch_size: int) -> BufferMemory:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return BufferMemory(jnp.zeros((batch_size, buffer_length), jnp.int32), zeros, zeros, zeros)

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> Array:
        return items

    def write(params: Params, memory: BufferMemory, features: Array, mask: Array, key: Key | None = None):
        index = memory.count[:, None] + jnp.cumsum(mask, 1) - 1
        count = memory.count + mask.sum(1)
        stays = mask & (index >= count[:, None] - buffer_length)  # of a segment longer than the buffer, the last items
        place = jnp.where(stays, index % buffer_length, buffer_length)
        items = jax.vmap(lambda kept, p, x: kept.at[p].set(x, mode="drop"))(memory.items, place, features)
        dropped = jnp.maximum(count - buffer_length, 0)
        return BufferMemory(items, count, dropped, memory.segments + mask.any(1)), (jnp.zeros(()), jnp.zeros(()))

    def slots(params: Params, memory: BufferMemory) -> tuple[Array, Array]:
        batch, features, masks = len(memory.count), [], []
        if recent:
            index = memory.count[:, None] - recent + jnp.arange(recent)
            ids = jnp.take_along_axis(memory.items, index % buffer_length, 1)
            features, masks = [embed(params, ids)], [index >= 0]
        if pooled:
            kept = jnp.arange(buffer_length) < memory.count[:, None]
            total = jnp.where(kept[..., None], embed(params, memory.items), 0.0).sum(1)
            mean = total / jnp.maximum(kept.sum(1), 1)[:, None]
            features, masks = [*features, mean[:, None]], [*masks, memory.count[:, None] > 0]
        return jnp.concatenate(features, 1).reshape(batch, -1, dim), jnp.concatenate(masks, 1)

    def read(params: Params, memory: BufferMemory, query: Array, query_mask: Array, key: Key | None = None) -> Array:
        return multihop.multihop(params["reader"], embed(params, query), *slots(params, memory))[0]

    return MemoryMachine(init, init_memory, encode, write, slots, read, embed, False, None)
