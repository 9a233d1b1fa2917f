"""An item-level GRU as a memory: one slot, and a linear layer to read it.

In the form for clicks this is GRU4REC (Hidasi et al. 2015).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers import recurrent
from rmjax.layers.embeddings import embed, init_items
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum


@flax.struct.dataclass
class GRUMemory:
    """The memory of B streams."""

    hidden: Array  # f32 [B, d] state after the last valid item
    history: Array  # f32 [B, d] mean of all item features so far
    items: Array  # f32 [B] number of items in that mean
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the GRU machine; for `timescale` see `recurrent.init_gru`."""

    ignores: ClassVar[tuple[str, ...]] = (
        "reason.hops",
    )  # common keys that such a run does not read
    dim: int = setting(64, at_least(1), "item width, d")
    history_sum: bool = setting(True, doc="gru: reads the mean of all items besides its state")
    timescale: int = setting(
        50,
        at_least(0),
        "segments that an untrained memory reaches back; 0: about two items; in machines of "
        "segment slots about two segments",
    )


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    A linear layer reads [h; history; query]. The history is the mean of all item features. Released
    click models use their sum; the mean does not grow with the stream. Without `history_sum` the
    layer reads [h; query].
    """
    dim, history_sum = settings.dim, settings.history_sum
    timescale = settings.timescale * context.segment_length

    def init(key: Key) -> Params:
        a, b = jax.random.split(key)
        # Before training the answer is the state (plus the history). It lies in the space of the
        # items, so the head can compare it with the query.
        identities = [jnp.eye(dim)] * (2 if history_sum else 1)
        reader = jnp.concatenate([*identities, jnp.zeros((dim, dim))])
        return init_items(a, num_items, dim, context.width) | {
            "gru": recurrent.init_gru(b, dim, dim, timescale),
            "reader": {"kernel": reader, "bias": jnp.zeros(dim)},
        }

    def init_memory(params: Params, batch_size: int) -> GRUMemory:
        zeros = jnp.zeros((batch_size, dim))
        return GRUMemory(zeros, zeros, jnp.zeros(batch_size), jnp.zeros(batch_size, jnp.int32))

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> _Features:
        x = embed(params, items)
        return x, recurrent.gru_input(params["gru"], x)  # the gates are computed outside the scan

    def write(
        params: Params, memory: GRUMemory, features: _Features, mask: Array, key: Key | None = None
    ) -> tuple[GRUMemory, Sum]:
        x, gates = features
        hidden, _ = recurrent.gru_scan(params["gru"], memory.hidden, gates, mask)
        history, items = memory.history, memory.items
        if history_sum:
            history, items = running_mean(history, items, x, mask)
        return GRUMemory(hidden, history, items, memory.segments), (jnp.zeros(()), jnp.zeros(()))

    def slots(params: Params, memory: GRUMemory) -> tuple[Array, Array]:
        return memory.hidden[:, None], jnp.ones((len(memory.hidden), 1), bool)

    def read(
        params: Params, memory: GRUMemory, query: Array, query_mask: Array, key: Key | None = None
    ) -> Array:
        state = [memory.hidden, memory.history] if history_sum else [memory.hidden]
        state = [jnp.broadcast_to(s[:, None], query.shape) for s in state]
        reader = params["reader"]
        answer: Array = jnp.concatenate([*state, query], -1) @ reader["kernel"] + reader["bias"]
        return answer

    functions = init, init_memory, encode, write, slots, read, embed
    table = ("embed",) if num_items else None
    return MemoryMachine(*functions, constant_size=True, gradient_range=None, table=table)


def running_mean(mean: Array, count: Array, x: Array, mask: Array) -> tuple[Array, Array]:
    """Takes further vectors into a mean.

    Args:
      mean: f32 [B, d] of the vectors so far.
      count: f32 [B] number of these vectors.
      x: f32 [B, N, d].
      mask: bool [B, N].

    Returns:
      The mean f32 [B, d] and the number f32 [B] of all vectors.
    """
    count = count + mask.sum(-1)
    news = jnp.where(mask[..., None], x - mean[:, None], 0.0).sum(1)
    return mean + news / jnp.maximum(count, 1.0)[:, None], count


_Features = tuple[Array, Array]  # item features f32 [B, N, d], input part of the gates [B, N, 3d]
