"""memorize: write a stream into a memory, segment by segment. Called again with its memory, it goes on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rmjax.layers.keys import fold
from rmjax.types import Array, Key, Memory, MemoryMachine, Params, Sum


class Memorized(NamedTuple):
    memory: Memory  # after the last segment, leading axis B
    asked: Memory | None  # before the asked positions, leading axes B, Q; None if none were asked
    aux: Sum  # (sum, count) of whatever the machine's `write` adds to the loss


def inert(write: Callable[..., tuple[Memory, Sum]]) -> Callable[..., tuple[Memory, Sum]]:
    """Wraps a raw `write` so that a wholly padded segment returns the memory bit for bit, and others are counted."""

    def wrapped(params: Params, memory: Memory, features: Any, mask: Array, key: Key | None = None):
        new, aux = write(params, memory, features, mask, key)
        alive = mask.any(-1)

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        new = jax.tree.map(keep, new, memory)
        return new.replace(segments=memory.segments + alive), aux

    return wrapped


def memorize(
    machine: MemoryMachine,
    params: Params,
    items: Array,
    mask: Array,
    memory: Memory | None = None,
    key: Key | None = None,
    positions: Array | None = None,
    *,
    block: int = 0,
    remat: bool = False,
    gradient_segments: int = 0,
) -> Memorized:
    """Writes items i32 [B, T, N], mask bool [B, T, N] into `memory` (None: an empty one).

    Scans over blocks of `block` segments: a block is encoded at once, then written one segment at a time. 0: all T;
    with `remat` some 4,096 items at a time, or more where the stream is so long that its memories would outgrow them.
    With `remat` a block keeps nothing but the memory it began with, and is computed again in the backward pass:
    activations are O(block) + O(T / block) memories. `key` [B] feeds dropout; segment s of a stream draws from
    fold_in(key, s) with s counted from the stream's beginning, so a split stream draws the same.
    `gradient_segments`: truncated backpropagation through time: gradients pass through at most so many segments at a
    time, counted from each stream's last one; 0: through all.
    `positions` i32 [B, Q], from 0 to T, asks for the memory after that many of these segments (0: as it was given);
    others are clipped.

    Raises:
      ValueError: items and mask are no arrays of one shape, the ids are no whole numbers, or `memory` has
        other streams.
    """
    if not hasattr(items, "dtype") or not hasattr(mask, "dtype"):
        raise ValueError(
            "memorize wants items and mask as arrays [B, T, N]; `rmjax.data.segments.segment` cuts streams so"
        )
    if items.shape[:3] != mask.shape or mask.ndim != 3:
        raise ValueError(
            f"memorize wants items and mask of one shape [B, T, N], got {items.shape} and {mask.shape}"
        )
    if items.ndim == 3 and not jnp.issubdtype(items.dtype, jnp.integer):
        raise ValueError(
            f"items of shape [B, T, N] are ids and must be whole numbers, got {items.dtype}"
        )
    batch, segments, _ = mask.shape
    if memory is None:
        memory = machine.init_memory(params, batch)
    elif memory.segments.shape[0] != batch:
        streams = memory.segments.shape[0]
        raise ValueError(f"memory has {streams} streams, items have {batch}: give the same streams")
    if not segments:
        asked = (
            None
            if positions is None
            else jax.tree.map(lambda m: _at(m, m[None][:0], positions), memory)
        )
        return Memorized(memory, asked, (jnp.zeros(()), jnp.zeros(())))
    if remat and not block:
        # What a segment keeps for the backward pass is some 40 memories, whatever the batch.
        block = max(1, 4096 // mask[:, 0].size, math.isqrt(segments // 40))
    block = min(block or segments, segments)
    blocks = -(-segments // block)
    time_first = lambda x: _pad(x.swapaxes(0, 1), blocks * block).reshape(
        blocks, block, batch, *x.shape[2:]
    )
    keys = None if key is None else time_first(_segment_keys(key, memory, mask))
    cut = None
    if gradient_segments:
        alive = mask.any(-1)
        left = alive[:, ::-1].cumsum(1)[
            :, ::-1
        ]  # segments of a stream from here to its own last one
        cut = time_first(alive & (left < left[:, :1]) & (left % gradient_segments == 0))

    def write_block(memory: Memory, block):
        items, mask, keys, cut = block
        features = machine.encode(params, items, mask, fold(keys, 0))

        def write_segment(memory: Memory, segment):
            features, mask, key, cut = segment
            if gradient_segments:
                memory = jax.tree.map(functools.partial(_cut, cut), memory)
            memory, aux = machine.write(params, memory, features, mask, fold(key, 1))
            return memory, (aux, memory if positions is not None else None)

        return jax.lax.scan(write_segment, memory, (features, mask, keys, cut))

    if remat:
        write_block = jax.checkpoint(write_block, prevent_cse=False)
    blocked = (time_first(items), time_first(mask), keys, cut)
    if blocks == 1:  # no outer loop: the compiler sees the encoder and the scan side by side
        last, (aux, each) = write_block(memory, jax.tree.map(lambda x: x[0], blocked))
    else:
        last, (aux, each) = jax.lax.scan(write_block, memory, blocked)
        each = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)
    asked = (
        None
        if positions is None
        else jax.tree.map(lambda m, ms: _at(m, ms, positions), memory, each)
    )
    return Memorized(last, asked, jax.tree.map(jnp.sum, aux))


def _cut(where: Array, x: Array) -> Array:
    """X [B, ...] without gradients where [B]."""
    return jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), jax.lax.stop_gradient(x), x)


def _pad(x: Array, length: int) -> Array:
    """Pads axis 0 with empty segments, which every machine leaves out."""
    if length == len(x):
        return x
    # Row 0 again (a key cannot be zero), but masks are false.
    fill = jnp.zeros_like(x[:1]) if x.dtype == bool else x[:1]
    return jnp.concatenate([x, jnp.broadcast_to(fill, (length - len(x), *x.shape[1:]))])


def _segment_keys(key: Key, memory: Memory, mask: Array) -> Key:
    """[B] -> [B, T]: fold_in(key, segments written before), empty segments not counted."""
    alive = mask.any(-1)
    index = memory.segments[:, None] + jnp.cumsum(alive, 1) - alive
    fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    return fold_in(key, index)


def _at(before: Array, each: Array, positions: Array) -> Array:
    """Before [B, ...], each [T, B, ...] -> [B, Q, ...]: entry p of [before, each_1, ..., each_T]."""
    every = jnp.concatenate([before[None], each])
    return every[jnp.clip(positions, 0, len(each)), jnp.arange(len(before))[:, None]]
