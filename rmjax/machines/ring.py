"""A ring of the last raw items, for machines that do all their work when they are read."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers.embeddings import embed
from rmjax.reason import hops
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum


@flax.struct.dataclass
class BufferMemory:
    """The memory of B streams: a ring of L items. Item i of a stream lies at place i % L."""

    items: Array  # i32 [B, L] ids, or f32 [B, L, F] features
    count: Array  # i32 [B] items written so far
    dropped: Array  # i32 [B] items that a full ring has dropped, the oldest first
    segments: Array  # i32 [B] segments written so far


def last(memory: BufferMemory, number: int) -> tuple[Array, Array]:
    """Returns the last items of each stream, oldest first.

    Args:
      memory: of B streams.
      number: how many items.

    Returns:
      Items [B, number] or [B, number, F], and their mask bool [B, number].
    """
    index = memory.count[:, None] - number + jnp.arange(number)
    return memory.items[jnp.arange(len(index))[:, None], index % memory.items.shape[1]], index >= 0


def _put(ring: Array, place: Array, items: Array) -> Array:
    """Writes items [N] of one stream to their places [N]; a place out of range drops the item."""
    return ring.at[place].set(items, mode="drop")


def make(
    num_items: int,
    context: Context,
    length: int,
    init: Callable[[Key], Params],
    slots: Callable[[Params, BufferMemory], tuple[Array, Array]],
    read: Callable[..., Array] | None = None,
) -> MemoryMachine:
    """Builds a machine that keeps the last items as they are.

    Args:
      num_items: number of item ids. 0: the items are features of `context.width`.
      context: facts about the streams, such as their segment length.
      length: places in the ring, L.
      init: as in `MemoryMachine`.
      slots: as in `MemoryMachine`.
      read: as in `MemoryMachine`; None: multi-hop attention over the slots (CM Appendix A.1) with
        `params["reader"]`.

    Returns:
      The machine.
    """

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
    ) -> tuple[BufferMemory, Sum]:
        index = memory.count[:, None] + jnp.cumsum(mask, 1) - 1
        count = memory.count + mask.sum(1)
        # A segment longer than the ring leaves its last items only.
        stays = mask & (index >= count[:, None] - length)
        place = jnp.where(stays, index % length, length)
        items = jax.vmap(_put)(memory.items, place, features)
        dropped = jnp.maximum(count - length, 0)
        return BufferMemory(items, count, dropped, memory.segments), (jnp.zeros(()), jnp.zeros(()))

    functions = init, init_memory, encode, write, slots, read or hops.reader(slots), embed
    table = ("embed",) if num_items else None
    return MemoryMachine(*functions, constant_size=False, gradient_range=None, table=table)
