"""A buffer memory: multi-hop attention over the last items one by one and the mean of all items."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax.linen.initializers import orthogonal

from rmjax.layers.embeddings import embed, init_items
from rmjax.machines import ring
from rmjax.machines.ring import BufferMemory
from rmjax.reason import hops
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params

__all__ = ["BufferMemory", "Settings", "make"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the buffer machine."""

    dim: int = setting(64, at_least(1), "item width, d")
    buffer_length: int = setting(0, at_least(0), "items a buffer holds; 0: the longest stream")
    recent: int = setting(20, at_least(0), "buffer: latest items read one by one; 0: none")
    pooled: bool = setting(True, doc="buffer: reads the mean of all items")
    before: int = setting(
        0, at_least(0), "buffer: items before an item that its slot holds, too; 0: no order"
    )

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if self.buffer_length and self.recent > self.buffer_length:
            yield "{recent} must be at most {buffer_length}"
        if not self.recent and not self.pooled:
            yield "{recent} and {pooled} leave nothing to read: set one of them"
        if self.before and self.before >= self.recent:
            yield "{before} must be below {recent}: the first slot has no others before it"


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    The slots are the features of the `recent` last items, oldest first. With `before`, a slot also
    has the features of the items before its own, through a kernel for each distance. Without it,
    readers know no order. If `pooled`, one more slot holds the mean feature of all items in the
    buffer.
    """
    dim, recent, length = settings.dim, settings.recent, settings.buffer_length or context.max_items
    if recent > length:
        raise ValueError(
            f"recent = {recent} must be at most the {length} items of the longest stream"
        )

    def init(key: Key) -> Params:
        a, b = jax.random.split(key)
        params = init_items(a, num_items, dim, context.width)
        params |= {"reader": hops.init(b, dim, dim, context)}
        if settings.before:
            kernels = jax.random.fold_in(key, 2)  # 0 and 1 are the keys of `split`
            params["before"] = orthogonal()(kernels, (settings.before, dim, dim))
        return params

    def slots(params: Params, memory: BufferMemory) -> tuple[Array, Array]:
        features, masks = [], []
        if recent:
            ids, mask = ring.last(memory, recent)
            x = embed(params, ids)
            earlier = jnp.where(mask[..., None], x, 0.0)
            for distance in range(1, min(settings.before, recent - 1) + 1):
                shifted = jnp.pad(earlier[:, :-distance], ((0, 0), (distance, 0), (0, 0)))
                x += shifted @ params["before"][distance - 1]
            features, masks = [x], [mask]
        if settings.pooled:
            kept = jnp.arange(length) < memory.count[:, None]
            total = jnp.where(kept[..., None], embed(params, memory.items), 0.0).sum(1)
            mean = total / jnp.maximum(kept.sum(1), 1)[:, None]
            features, masks = [*features, mean[:, None]], [*masks, memory.count[:, None] > 0]
        return jnp.concatenate(features, 1), jnp.concatenate(masks, 1)

    return ring.make(num_items, context, length, init, slots)
