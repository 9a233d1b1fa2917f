"""An item-level GRU as a memory (GRU4REC in its click form, Hidasi et al. 2015): one slot, its own read."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers import recurrent
from rmjax.layers.embeddings import embed, init_items
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params


@flax.struct.dataclass
class GRUMemory:
    hidden: Array  # f32 [B, d] state after the last valid item
    history: Array  # f32 [B, d] mean of all item features so far
    items: Array  # f32 [B] how many items that is
    segments: Array  # i32 [B] written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """timescale: the state reaches back so many segments; see `recurrent.init_gru`."""

    ignores = ("reason.hops",)  # common keys that such a run does not read
    dim: int = setting(64, at_least(1), "item width, d")
    history_sum: bool = setting(True, doc="gru: reads the mean of all items besides its state")
    timescale: int = setting(
        50, at_least(0), "segments that an untrained memory reaches back; 0: about two"
    )


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """A GRU of width d over single items; the answer is read from [h; target; history].

    The history is the mean of all item features: the sum of the released click models, scaled so that its size does
    not grow with the stream. Without it the state is h alone.
    """
    dim, history_sum = settings.dim, settings.history_sum
    timescale = settings.timescale * context.segment_length

    def init(key: Key) -> Params:
        a, b = jax.random.split(key)
        # Untrained, what is read is the state (and the mean), in the items' space, where the head can hold the query.
        reader = jnp.concatenate(
            [jnp.eye(dim)] * (2 if history_sum else 1) + [jnp.zeros((dim, dim))]
        )
        return init_items(a, num_items, dim, context.width) | {
            "gru": recurrent.init_gru(b, dim, dim, timescale),
            "reader": {"kernel": reader, "bias": jnp.zeros(dim)},
        }

    def init_memory(params: Params, batch_size: int) -> GRUMemory:
        zeros = jnp.zeros((batch_size, dim))
        return GRUMemory(zeros, zeros, jnp.zeros(batch_size), jnp.zeros(batch_size, jnp.int32))

    def encode(
        params: Params, items: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Array]:
        """-> item features and their part of the GRU's gates, hoisted out of the scan."""
        x = embed(params, items)
        return x, recurrent.gru_input(params["gru"], x)

    def write(
        params: Params,
        memory: GRUMemory,
        features: tuple[Array, Array],
        mask: Array,
        key: Key | None = None,
    ):
        x, gates = features
        hidden, _ = recurrent.gru_scan(params["gru"], memory.hidden, gates, mask)
        history, items = memory.history, memory.items
        if history_sum:
            items = items + mask.sum(-1)
            news = jnp.where(mask[..., None], x - history[:, None], 0.0).sum(1)
            history = history + news / jnp.maximum(items, 1.0)[:, None]
        return GRUMemory(hidden, history, items, memory.segments), (jnp.zeros(()), jnp.zeros(()))

    def slots(params: Params, memory: GRUMemory) -> tuple[Array, Array]:
        return memory.hidden[:, None], jnp.ones((len(memory.hidden), 1), bool)

    def read(
        params: Params, memory: GRUMemory, query: Array, query_mask: Array, key: Key | None = None
    ) -> Array:
        state = [memory.hidden, memory.history] if history_sum else [memory.hidden]
        state = [jnp.broadcast_to(s[:, None], query.shape) for s in state]
        return (
            jnp.concatenate([*state, query], -1) @ params["reader"]["kernel"]
            + params["reader"]["bias"]
        )

    return MemoryMachine(
        init,
        init_memory,
        encode,
        write,
        slots,
        read,
        embed,
        constant_size=True,
        gradient_range=None,
        table=("embed",) if num_items else None,
    )
