"""CM's Directly Reason baseline (CM section 4.1): a GRU over all kept items, and a linear layer.

The answer is linear([h; q]), with the last state h of the GRU and the query q.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from rmjax.layers import recurrent
from rmjax.layers.embeddings import embed, init_items
from rmjax.machines import ring
from rmjax.machines.ring import BufferMemory
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the Directly Reason machine."""

    ignores: ClassVar[tuple[str, ...]] = (
        "reason.hops",
    )  # common keys that such a run does not read

    dim: int = setting(64, at_least(1), "item width, d")
    buffer_length: int = setting(0, at_least(0), "items a buffer holds; 0: the longest stream")
    timescale: int = setting(
        50,
        at_least(0),
        "segments that an untrained memory reaches back; 0: about two items; in machines of "
        "segment slots about two segments",
    )


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    The only slot is the last state of the GRU. The timescale counts segments, see
    `recurrent.init_gru`.
    """
    dim, length = settings.dim, settings.buffer_length or context.max_items

    def init(key: Key) -> Params:
        a, b = jax.random.split(key)
        # Before training the answer is the state itself. It lies in the space of the items, so the
        # head can compare it with the query.
        kernel = jnp.concatenate([jnp.eye(dim), jnp.zeros((dim, dim))])
        gru = recurrent.init_gru(b, dim, dim, settings.timescale * context.segment_length)
        return init_items(a, num_items, dim, context.width) | {
            "encoder": gru,
            "reader": {"kernel": kernel, "bias": jnp.zeros(dim)},
        }

    def slots(params: Params, memory: BufferMemory) -> tuple[Array, Array]:
        ids, mask = ring.last(memory, length)
        x, p = embed(params, ids), params["encoder"]
        h = recurrent.gru_scan(p, jnp.zeros(x[:, 0].shape), recurrent.gru_input(p, x), mask)[0]
        return h[:, None], jnp.ones((len(h), 1), bool)

    def read(
        params: Params,
        memory: BufferMemory,
        query: Array,
        query_mask: Array,
        key: Key | None = None,
    ) -> Array:
        state, _ = slots(params, memory)
        both = jnp.concatenate([jnp.broadcast_to(state, query.shape), query], -1)
        answer: Array = both @ params["reader"]["kernel"] + params["reader"]["bias"]
        return answer

    return ring.make(num_items, context, length, init, slots, read)
