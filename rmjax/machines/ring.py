"""A ring of the last raw items: what machines keep that do all their work in reading."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers.embeddings import embed
from rmjax.types import Array, Context, Key, MemoryMachine, Params


@flax.struct.dataclass
class BufferMemory:
    items: Array  # i32 [B, L] or f32 [B, L, F] a ring: item i of the stream lies at i % L
    count: Array  # i32 [B] items written so far
    dropped: Array  # i32 [B] of these, how many a full buffer has dropped (the oldest go first)
    segments: Array  # i32 [B] written so far


def last(memory: BufferMemory, number: int) -> tuple[Array, Array]:
    """The last items, oldest first, and which there are: [B, number]."""
    index = memory.count[:, None] - number + jnp.arange(number)
    return memory.items[jnp.arange(len(index))[:, None], index % memory.items.shape[1]], index >= 0


def make(
    num_items: int,
    context: Context,
    length: int,
    init: Callable[[Key], Params],
    slots: Callable[[Params, BufferMemory], tuple[Array, Array]],
    read: Callable[..., Array],
) -> MemoryMachine:
    """A machine that keeps the last `length` items, and reads what `slots` makes of them."""

    def init_memory(params: Params, batch_size: int) -> BufferMemory:
        zeros = jnp.zeros(batch_size, jnp.int32)
        if num_items:
            items = jnp.zeros((batch_size, length), jnp.int32)
        else:
            items = jnp.zeros((batch_size, length, context.width))
        return BufferMemory(items, zeros, zeros, zeros)

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> Array:
        return items

    def write(
        params: Params, memory: BufferMemory, features: Array, mask: Array, key: Key | None = None
    ):
        index = memory.count[:, None] + jnp.cumsum(mask, 1) - 1
        count = memory.count + mask.sum(1)
        stays = mask & (
            index >= count[:, None] - length
        )  # of a segment longer than the buffer, the last items
        place = jnp.where(stays, index % length, length)
        items = jax.vmap(lambda kept, p, x: kept.at[p].set(x, mode="drop"))(
            memory.items, place, features
        )
        dropped = jnp.maximum(count - length, 0)
        return BufferMemory(items, count, dropped, memory.segments), (jnp.zeros(()), jnp.zeros(()))

    return MemoryMachine(
        init,
        init_memory,
        encode,
        write,
        slots,
        read,
        embed,
        constant_size=False,
        gradient_range=None,
        table=("embed",) if num_items else None,
    )
