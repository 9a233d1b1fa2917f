"""Fast and Forgetful Memory (Morad et al. 2023): traces of items that fade and turn.

The state has m traces in c contexts, complex numbers. An item is added to all contexts of a trace.
Traces fade at rates of their own, and contexts turn at angles of their own:

    z_t = gamma z_(t-1) + (sigmoid(W_g x_t) * W_i x_t) 1^T,    gamma_mc = exp(-|a_m| + i b_c)

The powers of gamma are known in closed form. The sum over a segment needs no memory, so `encode`
computes it outside of the scan. One step then carries the memory past all items of the segment.
This is the associative scan of section 4.1 of the paper, of which only the last value is wanted.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers import convolution, norms
from rmjax.layers.embeddings import embed, init_items
from rmjax.machines import keyvalue
from rmjax.reason import learned
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum

LONGEST = 1024.0  # items of the slowest full turn, as in the paper


@flax.struct.dataclass
class FFMMemory:
    """The memory of B streams."""

    traces: Array  # f32 [B, 2, m, c] real and imaginary parts of z
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the machine. The state has 2 m c floats."""

    ignores: ClassVar[tuple[str, ...]] = (
        "reason.hops",
    )  # common keys that such a run does not read
    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    traces: int = setting(64, at_least(1), "ffm: traces, which fade at rates of their own, m")
    contexts: int = setting(8, at_least(1), "ffm: angles at which each trace turns, c")
    timescale: int = setting(
        50,
        at_least(0),
        "segments that an untrained memory reaches back; 0: about two items; in machines of "
        "segment slots about two segments",
    )


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`."""
    s, dim = settings, settings.dim

    def init(key: Key) -> Params:
        table, slots, *keys = jax.random.split(key, 7)
        dense = lecun_normal()
        slowest = 1 / keyvalue.timescale(s.timescale, context)
        return init_items(table, num_items, dim, context.width) | {
            "item": dense(keys[0], (dim, s.traces)),  # W_i
            "item_gate": dense(keys[1], (dim, s.traces)),  # W_g
            "decay": jnp.linspace(slowest, 0.5, s.traces),  # a
            "angle": 2 * jnp.pi / jnp.linspace(1.0, LONGEST, s.contexts),  # b
            "mix": dense(keys[2], (2 * s.traces * s.contexts, dim)),
            "question": dense(keys[3], (dim, dim)),
            "question_gate": dense(keys[4], (dim, dim)),
            "slots": learned.init(slots, s.slots, dim),
        }

    def init_memory(params: Params, batch_size: int) -> FFMMemory:
        empty = jnp.zeros((batch_size, 2, s.traces, s.contexts))
        return FFMMemory(empty, jnp.zeros(batch_size, jnp.int32))

    def encode(params: Params, items: Array, mask: Array, key: Key | None = None) -> Array:
        """Returns what each segment adds to the traces, f32 [B, t, 2, m, c]."""
        x = embed(params, items)
        x = jax.nn.sigmoid(x @ params["item_gate"]) * (x @ params["item"])
        # The last item goes first: place n then holds the item that n items follow.
        x, mask = convolution.compact(x[..., ::-1, :], mask[..., ::-1])
        x = jnp.where(mask[..., None], x, 0.0)
        return jnp.einsum("...nm,nrmc->...rmc", x, powers(params, jnp.arange(x.shape[-2])))

    def write(
        params: Params, memory: FFMMemory, features: Array, mask: Array, key: Key | None = None
    ) -> tuple[FFMMemory, Sum]:
        past = jnp.moveaxis(memory.traces, 1, 0)
        turn = jnp.moveaxis(powers(params, mask.sum(-1)), 1, 0)
        real = past[0] * turn[0] - past[1] * turn[1]
        imaginary = past[0] * turn[1] + past[1] * turn[0]
        traces = jnp.stack([real, imaginary], 1) + features
        return FFMMemory(traces, memory.segments), (jnp.zeros(()), jnp.zeros(()))

    def slots(params: Params, memory: FFMMemory) -> tuple[Array, Array]:
        return learned.slots(read, params, memory)

    functions = init, init_memory, encode, write, slots, read, embed
    table = ("embed",) if num_items else None
    return MemoryMachine(*functions, constant_size=True, gradient_range=None, table=table)


def powers(params: Params, exponent: Array) -> Array:
    """Powers of gamma: exponent [...] to real and imaginary parts f32 [..., 2, m, c]."""
    exponent = exponent[..., None, None]
    size = jnp.exp(-jnp.abs(params["decay"])[:, None] * exponent)
    angle = params["angle"] * exponent
    return jnp.stack([size * jnp.cos(angle), size * jnp.sin(angle)], -3)


def read(
    params: Params, memory: FFMMemory, query: Array, query_mask: Array, key: Key | None = None
) -> Array:
    """Reads as the paper does (section 4.2), the question in the place of the present item.

    A gate of the question mixes norm(W_z [Re z; Im z]) and a linear layer of the question.
    """
    state = memory.traces.reshape(len(memory.traces), -1) @ params["mix"]
    gate = jax.nn.sigmoid(query @ params["question_gate"])
    answer: Array = norms.layer(state)[:, None] * gate + query @ params["question"] * (1 - gate)
    return answer
