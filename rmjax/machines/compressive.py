"""The Compressive Transformer (Rae et al. 2020) as a memory of K slots: RM's baseline CT.

Every layer attends to the segment, to its newest inputs before it, and to older inputs that are
compressed, `compression` rows to one. The outputs of the top layer are compressed at once; the
newest K of these rows are the slots. So the slots hold at most the last K * compression items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers import compressive
from rmjax.layers.compressive import Compressed
from rmjax.layers.embeddings import embed, init_items
from rmjax.layers.keys import fold
from rmjax.layers.relative import RelativeBlock
from rmjax.reason import hops
from rmjax.registry import at_least, below, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum


@flax.struct.dataclass
class CompressiveMemory:
    """The memory of B streams.

    Level l < L holds the inputs of layer l: the newest N, and K compressed rows of those before.
    Level L holds the outputs of the top layer: no recent row, and K compressed rows, the slots.
    """

    levels: tuple[Compressed, ...]  # f32 rows [B, N, d] and [B, K, d], i32 lengths [B]
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the compressive machine.

    Gradients pass through the memory. `machine.gradient_segments = 1` stops them between segments,
    as Rae et al. do: then only the last segment trains the layers.
    """

    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    layers: int = setting(3, at_least(1), "layers of the segment encoder")
    heads: int = setting(4, at_least(1), "attention heads; divides machine.dim")
    dropout: float = setting(0.0, below(0, 1), "dropout rate of the Transformer layers")
    compression: int = setting(5, at_least(1), "compressive: items in one slot")

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if self.dim % self.heads:
            yield "{heads} must divide {dim}"


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    A segment's length need not be a multiple of `compression`: its first rows then share a slot
    with zeros, see `compressive.compress`. The slots then hold fewer than K * compression items.
    The machine's loss is the mean over the layers of their reconstruction losses.
    """
    s, dim, length = settings, settings.dim, context.segment_length
    block = RelativeBlock(s.heads, s.dropout, causal=False, prenorm=True, dtype=context.dtype)
    names = [f"layer_{i}" for i in range(s.layers)]

    def init_layer(key: Key) -> Params:
        row = jnp.zeros((1, 1, dim)), jnp.ones((1, 1), bool)
        return block.init(key, *row, *row)["params"]

    def init_compression(key: Key) -> Params:
        return compressive.init_compression(key, dim, s.compression)

    def init(key: Key) -> Params:
        a, b, c, d = jax.random.split(key, 4)
        return init_items(a, num_items, dim, context.width) | {
            "layers": dict(zip(names, map(init_layer, jax.random.split(b, s.layers)), strict=True)),
            "norm": {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)},
            "compression": [init_compression(k) for k in jax.random.split(c, s.layers + 1)],
            "reader": hops.init(d, dim, dim, context),
        }

    def init_memory(params: Params, batch_size: int) -> CompressiveMemory:
        inner = compressive.empty(batch_size, length, s.slots, dim)
        top = compressive.empty(batch_size, 0, s.slots, dim)
        return CompressiveMemory((inner,) * s.layers + (top,), jnp.zeros(batch_size, jnp.int32))

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> Array:
        return embed(params, items)

    def write(
        params: Params, memory: CompressiveMemory, x: Array, mask: Array, key: Key | None = None
    ) -> tuple[CompressiveMemory, Sum]:
        *inner, top = memory.levels
        *compressions, last = params["compression"]
        levels, losses = [], []
        for i, (level, compression) in enumerate(zip(inner, compressions, strict=True)):
            layer = params["layers"][names[i]]
            after, fallen = compressive.push(compression, level, x, mask)
            given = layer, compression, s.heads, x, mask, *fallen
            losses.append(compressive.reconstruction_loss(*given))
            levels.append(after)
            seen = level.rows, level.mask
            x = cast(Array, block.apply({"params": layer}, x, mask, *seen, fold(key, i)))
        outputs = cast(Array, nn.LayerNorm(epsilon=1e-5).apply({"params": params["norm"]}, x))
        levels.append(compressive.push(last, top, outputs, mask)[0])
        aux = compressive.mean_over_layers(losses)
        return CompressiveMemory(tuple(levels), memory.segments), aux

    def slots(params: Params, memory: CompressiveMemory) -> tuple[Array, Array]:
        top = memory.levels[-1].old
        return top.rows, top.mask

    functions = init, init_memory, encode, write, slots, hops.reader(slots), embed
    table = ("embed",) if num_items else None
    return MemoryMachine(
        *functions, constant_size=True, gradient_range=None, table=table, has_loss=True
    )
