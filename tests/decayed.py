"""A memory machine from outside the package: decayed linear attention.

It is the recurrent form of RetNet (Sun et al. 2023): S_t = g S_{t-1} + k_t^T v_t over single items,
read as q S. The memory is one matrix for each stream, of any length.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

import rmjax
from rmjax.layers.embeddings import embed, init_items
from rmjax.registry import inside


@dataclasses.dataclass(frozen=True)
class Settings:
    dim: int = rmjax.setting(64, rmjax.at_least(1), "item width, d")
    decay: float = rmjax.setting(0.99, inside(0, 1), "decayed: factor at each later item, g")


@flax.struct.dataclass
class State:
    matrix: jax.Array  # f32 [B, d, d]
    segments: jax.Array  # i32 [B]


@rmjax.register_machine("decayed", Settings)
def make(num_items: int, settings: Settings, context: rmjax.Context) -> rmjax.MemoryMachine:
    dim, decay = settings.dim, settings.decay

    def init(key):
        a, *keys = jax.random.split(key, 5)
        draw = lambda k: lecun_normal()(k, (dim, dim))
        kernels = {name: draw(k) for name, k in zip("qkvo", keys, strict=True)}
        return init_items(a, num_items, dim, context.width) | kernels

    def init_memory(params, batch_size):
        return State(jnp.zeros((batch_size, dim, dim)), jnp.zeros(batch_size, jnp.int32))

    def encode(params, items, mask, key=None):
        x = embed(params, items)
        return x @ params["k"] / dim, x @ params["v"]

    def write(params, memory, features, mask, key=None):
        keys, values = features
        after = mask.sum(1, keepdims=True) - jnp.cumsum(mask, 1)  # later items of the segment
        weight = jnp.where(mask, decay**after, 0.0)
        news = jnp.einsum("bn,bnk,bnv->bkv", weight, keys, values)
        matrix = decay ** mask.sum(1)[:, None, None] * memory.matrix + news
        return State(matrix, memory.segments), (jnp.zeros(()), jnp.zeros(()))

    def slots(params, memory):
        return memory.matrix, jnp.ones(memory.matrix.shape[:2], bool)

    def read(params, memory, query, query_mask, key=None):
        return query + (query @ params["q"]) @ memory.matrix @ params["o"]

    functions = init, init_memory, encode, write, slots, read, embed
    table = ("embed",) if num_items else None
    return rmjax.MemoryMachine(*functions, constant_size=True, gradient_range=None, table=table)
