"""`memorize` writes streams into a memory, segment by segment.

Called again with the memory that it returned, it goes on where it stopped: that is streaming.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from rmjax.layers.keys import fold
from rmjax.types import Array, Key, Memory, MemoryMachine, Params, Sum

ITEMS_AT_ONCE = 4096  # items that a block encodes at once, with `remat` and no `block`
MEMORIES_A_SEGMENT = 40  # a segment keeps about so many for the backward pass, for any batch

_M = TypeVar("_M")
_F = TypeVar("_F")
_Segment = tuple[object, Array, Key | None, Array | None]  # features, mask, keys, cut
_Written = tuple[Memory, tuple[Sum, Memory | None]]  # the last memory; aux, memory of each segment


class Memorized(NamedTuple):
    """The results of `memorize`."""

    memory: Memory  # after the last segment, leading axis B
    asked: Memory | None  # before the asked positions, leading axes B, Q; None without positions
    aux: Sum  # (sum, count) of the machine's own loss, see `MemoryMachine.has_loss`


def inert(write: Callable[..., tuple[Memory, Sum]]) -> Callable[..., tuple[Memory, Sum]]:
    """Makes a `write` inert to padding, and lets it count segments.

    Args:
      write: as in `MemoryMachine`. It need not treat padded segments, nor count.

    Returns:
      A `write` that returns the memory bit for bit where the segment is wholly padded, and adds one
      to the memory's `segments` elsewhere.
    """

    def wrapped(
        params: Params, memory: Memory, features: object, mask: Array, key: Key | None = None
    ) -> tuple[Memory, Sum]:
        new, aux = write(params, memory, features, mask, key)
        alive = mask.any(-1)
        new = where_rows(alive, new, memory)
        return new.replace(segments=memory.segments + alive), aux

    return wrapped


def where_rows(valid: Array, new: _M, old: _M) -> _M:
    """Takes the rows of `new` where valid [B] is true, and those of `old` elsewhere."""
    keep = lambda x, y: jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, y)
    kept: _M = jax.tree.map(keep, new, old)
    return kept


def scan_items(step: Callable[[_M, _F], _M], memory: _M, features: _F, mask: Array) -> _M:
    """Writes the items of a segment one by one; masked items change nothing.

    Args:
      step: (memory, features [B, ...] of one item of each stream) -> memory.
      memory: a pytree with leading axis B.
      features: a pytree of [B, N, ...].
      mask: bool [B, N].

    Returns:
      The memory after the last item.
    """

    def masked(memory: _M, item: tuple[_F, Array]) -> tuple[_M, None]:
        features, valid = item
        return where_rows(valid, step(memory, features), memory), None

    return jax.lax.scan(masked, memory, _items_first((features, mask)))[0]


def _items_first(tree: _F) -> _F:
    """[B, N, ...] -> [N, B, ...]."""
    swapped: _F = jax.tree.map(lambda x: x.swapaxes(0, 1), tree)
    return swapped


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
    """Writes B streams into a memory.

    The scan runs over blocks. A block is encoded at once, and then written segment by segment.

    Args:
      machine: the machine that writes.
      params: of `machine.init`.
      items: i32 [B, T, N] ids, or f32 [B, T, N, F] features.
      mask: bool [B, T, N], true where an item is.
      memory: of the B streams so far. None: the streams begin here, with an empty memory.
      key: [B], draws dropout; None: there is no dropout. Segment s of a stream draws from
        fold_in(key, s). s counts from the beginning of the stream, so a stream that comes in parts
        draws the same.
      positions: i32 [B, Q], 0 to T. Asks for the memory after so many of these segments; 0: for the
        memory before them. Numbers out of range are clipped.
      block: segments of a block. 0: all T. With `remat` 0 means some 4,096 items. It means more in
        streams so long that the memories between blocks would need more space than one block.
      remat: keeps only the memory before each block, and computes the block again in the backward
        pass. Activations then need the space of one block and T / block memories.
      gradient_segments: truncated backpropagation through time. Gradients pass through at most so
        many segments at a time, counted back from the last segment of each stream. 0: through all.

    Returns:
      The memory after the last segment, the memories at `positions`, and the machine's own loss.

    Raises:
      ValueError: `items` and `mask` are not arrays, or their shapes disagree; ids are not integers;
        or `memory` has another number of streams.
    """
    _check_streams(items, mask, memory)
    batch, segments, length = mask.shape
    if memory is None:
        memory = machine.init_memory(params, batch)
    if not segments:
        before = jax.tree.map(lambda m: m[None][:0], memory)
        return Memorized(memory, _asked(memory, before, positions), (jnp.zeros(()), jnp.zeros(())))
    block = _block_size(block, remat, segments, batch * length)
    blocks = -(-segments // block)

    def time_first(x: Array) -> Array:
        """[B, T, ...] -> [blocks, block, B, ...]."""
        padded = _pad(x.swapaxes(0, 1), blocks * block)
        return padded.reshape(blocks, block, batch, *x.shape[2:])

    keys = None if key is None else time_first(_segment_keys(key, memory, mask))
    cuts = time_first(_cuts(mask, gradient_segments)) if gradient_segments else None
    keep = positions is not None
    write: Callable[..., _Written] = functools.partial(_write_block, machine, params, keep)
    if remat:
        write = jax.checkpoint(write, prevent_cse=False)
    blocked = (time_first(items), time_first(mask), keys, cuts)
    if blocks == 1:  # no outer loop: the compiler sees the encoder and the scan side by side
        last, (aux, after) = write(memory, jax.tree.map(lambda x: x[0], blocked))
    else:
        last, (aux, after) = jax.lax.scan(write, memory, blocked)
        after = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after)
    return Memorized(last, _asked(memory, after, positions), jax.tree.map(jnp.sum, aux))


def _write_block(
    machine: MemoryMachine,
    params: Params,
    keep: bool,
    memory: Memory,
    block: tuple[Array, Array, Key | None, Array | None],
) -> _Written:
    """Encodes a block of t segments at once, and writes them one by one.

    The block is items [t, B, N], mask bool [t, B, N], keys [t, B] and cuts bool [t, B]. Returns the
    memory, the aux of each segment and, if `keep`, the memory after each segment.
    """
    items, mask, keys, cuts = block
    features = machine.encode(params, items, mask, fold(keys, 0))
    if machine.write_segments is not None:
        after = machine.write_segments(params, memory, features, mask, cuts)
        none = jnp.zeros(len(mask))
        return jax.tree.map(lambda x: x[-1], after), ((none, none), after if keep else None)

    def write_segment(memory: Memory, segment: _Segment) -> _Written:
        features, mask, key, cut = segment
        if cut is not None:
            memory = jax.tree.map(functools.partial(_stop_gradient, cut), memory)
        memory, aux = machine.write(params, memory, features, mask, fold(key, 1))
        return memory, (aux, memory if keep else None)

    return jax.lax.scan(write_segment, memory, (features, mask, keys, cuts))


def _check_streams(items: Array, mask: Array, memory: Memory | None) -> None:
    """Raises ValueError unless items and mask are [B, T, N], and the memory has B streams."""
    if not hasattr(items, "dtype") or not hasattr(mask, "dtype"):
        raise ValueError(
            "memorize needs items and mask as arrays [B, T, N]; make them with "
            "rmjax.data.segments.segment"
        )
    if items.shape[:3] != mask.shape or mask.ndim != 3:
        raise ValueError(
            "memorize needs items and mask of one shape [B, T, N], "
            f"got {items.shape} and {mask.shape}"
        )
    if items.ndim == 3 and not jnp.issubdtype(items.dtype, jnp.integer):
        raise ValueError(
            f"items of shape [B, T, N] are ids and must be whole numbers, got {items.dtype}"
        )
    if memory is not None and memory.segments.shape[0] != mask.shape[0]:
        streams = f"memory has {memory.segments.shape[0]} streams, items have {mask.shape[0]}"
        raise ValueError(f"{streams}: give the same streams")


def _block_size(block: int, remat: bool, segments: int, items: int) -> int:
    """Segments of a block; `items` counts the places of one segment in all rows."""
    if remat and not block:
        # The last number balances the memories between blocks against the memories inside a block.
        block = max(1, ITEMS_AT_ONCE // items, math.isqrt(segments // MEMORIES_A_SEGMENT))
    return min(block or segments, segments)


def _cuts(mask: Array, gradient_segments: int) -> Array:
    """Returns bool [B, T], true where no gradient may pass from a segment to earlier ones."""
    alive = mask.any(-1)
    left = alive[:, ::-1].cumsum(1)[:, ::-1]  # segments up to the last one of the stream
    return alive & (left < left[:, :1]) & (left % gradient_segments == 0)


def _stop_gradient(where: Array, x: Array) -> Array:
    """Returns x [B, ...], without gradients where `where` [B] is true."""
    return where_rows(where, jax.lax.stop_gradient(x), x)


def _pad(x: Array, length: int) -> Array:
    """Pads axis 0 with empty segments, which change no memory."""
    if length == len(x):
        return x
    # Masks are padded with false, all else with a copy of row 0, since a key cannot be zero.
    fill = jnp.zeros_like(x[:1]) if x.dtype == bool else x[:1]
    return jnp.concatenate([x, jnp.broadcast_to(fill, (length - len(x), *x.shape[1:]))])


def _segment_keys(key: Key, memory: Memory, mask: Array) -> Key:
    """Returns keys [B, T]: fold_in(key [B], number of segments before), without empty segments."""
    alive = mask.any(-1)
    index = memory.segments[:, None] + jnp.cumsum(alive, 1) - alive
    fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    return fold_in(key, index)


def _asked(before: Memory, after: Memory, positions: Array | None) -> Memory | None:
    """Picks the entries `positions` [B, Q] of the memories [before, after_1, ..., after_T].

    The arrays of `before` are [B, ...], those of `after` [T, B, ...], those returned [B, Q, ...].
    """
    if positions is None:
        return None

    def pick(before: Array, after: Array) -> Array:
        every = jnp.concatenate([before[None], after])
        return every[jnp.clip(positions, 0, len(after)), jnp.arange(len(before))[:, None]]

    return jax.tree.map(pick, before, after)
