"""A buffer as a memory: it keeps the raw items, and all the work is done in reading them."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers import recurrent
from rmjax.layers.embeddings import embed, init_items
from rmjax.reason import multihop
from rmjax.types import Array, Key, MemoryMachine, Params


@flax.struct.dataclass
class BufferMemory:
    items: Array  # i32 [B, L] or f32 [B, L, F] a ring: item i of the stream lies at i % L
    count: Array  # i32 [B] items written so far
    dropped: Array  # i32 [B] of these, how many a full buffer has dropped (the oldest go first)
    segments: Array  # i32 [B] written so far


def make(
    num_items: int,
    *,
    dim: int = 64,
    buffer_length: int = 1000,
    encoder: str = "none",
    recent: int = 20,
    pooled: bool = True,
    hops: int = 1,
    timescale: int = 0,
    width: int = 0,
) -> MemoryMachine:
    """Keeps the last `buffer_length` items, and reads what `encoder` makes of them:

    'none': slots are the features of the last `recent` items, oldest first, and, if `pooled`, the mean feature of all
    kept items (recent = 0 reads the mean alone, pooled = False the last items alone); multi-hop attention over these.
    'gru': one slot, the last state of a GRU over all kept items, read as linear([h; q]) (CM's Directly Reason);
    timescale: items, see `recurrent.init_gru`.
    'bigru': the outputs of a bidirectional GRU at each kept item, and multi-hop attention over them (CM's Multi-Hop
    Reason).
    width: see `embeddings.init_items`.
    """
    if encoder not in ("none", "gru", "bigru"):
        raise ValueError(f"encoder must be 'none', 'gru' or 'bigru', got {encoder!r}")
    if not 0 <= recent <= buffer_length and encoder == "none":
        raise ValueError(f"recent must lie in 0..buffer_length = {buffer_length}, got {recent}")
    if not recent and not pooled and encoder == "none":
        raise ValueError("recent = 0 and pooled = False leave nothing to read: set one of them")

    def init(key: Key) -> Params:
        a, b = jax.random.split(key)
        params = init_items(a, num_items, dim, width)
        if encoder == "gru":
            # Untrained, what is read is the state, in the items' space, where the head can hold the query.
            kernel = jnp.concatenate([jnp.eye(dim), jnp.zeros((dim, dim))])
            gru = recurrent.init_gru(b, dim, dim, timescale)
            return params | {"encoder": gru, "reader": {"kernel": kernel, "bias": jnp.zeros(dim)}}
        if encoder == "bigru":
            b, c = jax.random.split(b)
            params["encoder"] = recurrent.init_bigru(c, dim, dim)
        return params | {"reader": multihop.init(b, dim, dim, hops)}

    def init_memory(params: Params, batch_size: int) -> BufferMemory:
        zeros = jnp.zeros(batch_size, jnp.int32)
        if num_items:
            items = jnp.zeros((batch_size, buffer_length), jnp.int32)
        else:
            items = jnp.zeros((batch_size, buffer_length, width))
        return BufferMemory(items, zeros, zeros, zeros)

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

    def last(memory: BufferMemory, number: int) -> tuple[Array, Array]:
        """The last items, oldest first, and which there are: [B, number]."""
        index = memory.count[:, None] - number + jnp.arange(number)
        return memory.items[jnp.arange(len(index))[:, None], index % buffer_length], index >= 0

    def slots(params: Params, memory: BufferMemory) -> tuple[Array, Array]:
        if encoder != "none":
            ids, mask = last(memory, buffer_length)
            x, p = embed(params, ids), params["encoder"]
            if encoder == "bigru":
                return recurrent.bigru(p, x, mask)[0], mask
            h = recurrent.gru_scan(p, jnp.zeros(x[:, 0].shape), recurrent.gru_input(p, x), mask)[0]
            return h[:, None], jnp.ones((len(h), 1), bool)
        features, masks = [], []
        if recent:
            ids, mask = last(memory, recent)
            features, masks = [embed(params, ids)], [mask]
        if pooled:
            kept = jnp.arange(buffer_length) < memory.count[:, None]
            total = jnp.where(kept[..., None], embed(params, memory.items), 0.0).sum(1)
            mean = total / jnp.maximum(kept.sum(1), 1)[:, None]
            features, masks = [*features, mean[:, None]], [*masks, memory.count[:, None] > 0]
        return jnp.concatenate(features, 1), jnp.concatenate(masks, 1)

    def read(params: Params, memory: BufferMemory, query: Array, query_mask: Array, key: Key | None = None) -> Array:
        found, mask = slots(params, memory)
        if encoder != "gru":
            return multihop.multihop(params["reader"], query, found, mask)[0]
        both = jnp.concatenate([jnp.broadcast_to(found, query.shape), query], -1)
        return both @ params["reader"]["kernel"] + params["reader"]["bias"]

    return MemoryMachine(init, init_memory, encode, write, slots, read, embed, False, None)
