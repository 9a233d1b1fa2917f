"""The Recurrent Memory Transformer (Bulatov et al. 2022) as a memory of K slots.

K memory tokens stand before a segment's items. A bidirectional Transformer reads both; its outputs
at the memory tokens are the new memory. Gradients pass through the memory to the first segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import jax
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.layers.embeddings import embed, init_items
from rmjax.layers.transformer import Transformer
from rmjax.machines.slots import SlotMemory, read, read_slots
from rmjax.reason import hops
from rmjax.registry import at_least, below, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the Recurrent Memory Transformer."""

    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    layers: int = setting(3, at_least(1), "layers of the segment encoder")
    heads: int = setting(4, at_least(1), "attention heads; divides machine.dim")
    dropout: float = setting(0.0, below(0, 1), "dropout rate of the Transformer layers")

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if self.dim % self.heads:
            yield "{heads} must divide {dim}"


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`."""
    s, dim = settings, settings.dim
    model = Transformer(s.layers, s.heads, s.dropout, context.dtype)

    def init(key: Key) -> Params:
        a, b, c, d = jax.random.split(key, 4)
        tokens = jnp.zeros((1, 1, s.slots + context.segment_length, dim))
        return (
            init_items(a, num_items, dim, context.width)
            | {
                "slots": normal(1.0)(b, (s.slots, dim)),  # K vectors; equal ones would stay alike
                "encoder": model.init(c, tokens, jnp.ones(tokens.shape[:3], bool))["params"],
                "reader": hops.init(d, dim, dim, context),
            }
        )

    def init_memory(params: Params, batch_size: int) -> SlotMemory:
        first = jnp.broadcast_to(params["slots"], (batch_size, s.slots, dim))
        return SlotMemory(first, jnp.zeros(batch_size, jnp.int32))

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> Array:
        return embed(params, items)

    def write(
        params: Params, memory: SlotMemory, x: Array, mask: Array, key: Key | None = None
    ) -> tuple[SlotMemory, Sum]:
        tokens = jnp.concatenate([memory.slots, x], 1)  # [B, K+N, d]
        seen = jnp.concatenate([jnp.ones(memory.slots.shape[:2], bool), mask], 1)
        rows = None if key is None else key[:, None]  # the encoder takes R = 1 row of each example
        inputs = tokens[:, None], seen[:, None]
        y = cast(Array, model.apply({"params": params["encoder"]}, *inputs, key=rows))
        return SlotMemory(y[:, 0, : s.slots], memory.segments), (jnp.zeros(()), jnp.zeros(()))

    functions = init, init_memory, encode, write, read_slots, read, embed
    table = ("embed",) if num_items else None
    return MemoryMachine(*functions, constant_size=True, gradient_range=None, table=table)
