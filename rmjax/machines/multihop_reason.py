"""CM's Multi-Hop Reason baseline (CM section 4.1): multi-hop attention over a bidirectional GRU.

The GRU runs over all kept items at every read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from rmjax.layers import recurrent
from rmjax.layers.embeddings import embed, init_items
from rmjax.machines import ring
from rmjax.machines.ring import BufferMemory
from rmjax.reason import hops
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the Multi-Hop Reason machine."""

    dim: int = setting(64, at_least(1), "item width, d")
    buffer_length: int = setting(0, at_least(0), "items a buffer holds; 0: the longest stream")

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if self.dim % 2:
            yield "{dim} must be even: each direction of a bidirectional GRU has half of it"


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    Each kept item has a slot: the output of the GRU at that item.
    """
    dim, length = settings.dim, settings.buffer_length or context.max_items

    def init(key: Key) -> Params:
        a, b = jax.random.split(key)
        b, c = jax.random.split(b)
        return init_items(a, num_items, dim, context.width) | {
            "encoder": recurrent.init_bigru(c, dim, dim),
            "reader": hops.init(b, dim, dim, context),
        }

    def slots(params: Params, memory: BufferMemory) -> tuple[Array, Array]:
        ids, mask = ring.last(memory, length)
        return recurrent.bigru(params["encoder"], embed(params, ids), mask)[0], mask

    return ring.make(num_items, context, length, init, slots)
