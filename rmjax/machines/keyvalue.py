"""Memories that map keys to values: what `gated_delta` and `titans` share.

Items become keys and values through a linear layer, a short convolution and SiLU. A rule writes
them into its state. A question becomes a key, and reads the state. This block is that of Yang et
al. 2024 (section 3.3); Behrouz et al. 2025 (section 4.4) use it, too.

The convolution binds an item to the items before it. The value of a word is then under the key of
the word before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import orthogonal

from rmjax.layers import convolution, norms
from rmjax.layers.embeddings import embed, init_items
from rmjax.reason import learned
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, State, Sum


@flax.struct.dataclass
class KeyValueMemory:
    """The memory of B streams."""

    state: State  # f32 [B, ...], of the rule
    tail: Array  # f32 [B, taps - 1, 2d] last keys and values before the convolution
    segments: Array  # i32 [B] segments written so far


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of every memory that maps keys to values."""

    dim: int = setting(64, at_least(1), "item width, d")
    slots: int = setting(20, at_least(1), "memory slots, K")
    taps: int = setting(4, at_least(1), "items that the convolution of keys and values sees")
    chunk: int = setting(32, at_least(1), "items that are written at once")
    timescale: int = setting(
        50,
        at_least(0),
        "segments that an untrained memory reaches back; 0: about two items; in machines of "
        "segment slots about two segments",
    )

    @property
    def ignores(self) -> dict[str, str]:
        """Keys that such a run does not read, see `rmjax.registry.Registry.ignored_by`."""
        return {"reason.hops": "kind"}


class Rule(NamedTuple):
    """How items change a state, and how keys read it.

    H is the number of heads, e = d / H their width, n the number of items of a chunk.
    """

    heads: int
    """H; divides d."""
    init: Callable[[Key], Params]
    """init(key) -> parameters."""
    init_state: Callable[[Params, int], State]
    """init_state(params, batch_size) -> the state of empty streams, leading axis B."""
    gates: Callable[[Params, Array, Array], Any]
    """gates(params, x, mask) -> what `write` needs besides keys and values, a pytree [..., n, ...].

    x is f32 [..., n, d], the items of chunks; mask is bool [..., n]. The gates of a masked item let
    `write` change nothing.
    """
    write: Callable[[State, Array, Array, Any], State]
    """write(state, k, v, gates) -> the state after a chunk.

    k and v are f32 [B, n, H, e]; keys have unit length.
    """
    look_up: Callable[[State, Array], Array]
    """look_up(state, q) -> values f32 [B, Q, H, e] under the keys q f32 [B, Q, H, e]."""


def make(num_items: int, settings: Settings, context: Context, rule: Rule) -> MemoryMachine:
    """Builds a memory that maps keys to values, see `rmjax.types.MemoryMachine`.

    Args:
      num_items: number of item ids. 0: the items are feature vectors.
      settings: of the kind.
      context: facts about the streams.
      rule: of the state.

    Returns:
      The machine.
    """
    machine = _KeyValue(num_items, settings, context, rule)
    return MemoryMachine(
        init=machine.init,
        init_memory=machine.init_memory,
        encode=machine.encode,
        write=machine.write,
        slots=machine.slots,
        read=machine.read,
        embed=embed,
        constant_size=True,
        gradient_range=None,
        table=("embed",) if num_items else None,
    )


@dataclasses.dataclass(frozen=True)
class _KeyValue:
    """The functions of the machine, over its settings."""

    num_items: int
    settings: Settings
    context: Context
    rule: Rule

    def init(self, key: Key) -> Params:
        s, keys = self.settings, jax.random.split(key, 6)
        of_key, of_value = (orthogonal()(k, (s.dim, s.dim)) for k in keys[1:3])
        # Before training a question has the key of the item that it is, and the answer is about
        # the sum of that item and the item before it.
        return init_items(keys[0], self.num_items, s.dim, self.context.width) | {
            "item": jnp.concatenate([of_key, of_value], 1),  # f32 [d, 2d]
            "filters": convolution.init(keys[3], s.taps, 2 * s.dim),
            "rule": self.rule.init(keys[4]),
            "query": jnp.copy(of_key),
            "gate": {"kernel": jnp.zeros((s.dim, s.dim)), "bias": jnp.ones(s.dim)},
            "out": of_value.T,
            "slots": learned.init(keys[5], s.slots, s.dim),
        }

    def init_memory(self, params: Params, batch_size: int) -> KeyValueMemory:
        tail = jnp.zeros((batch_size, self.settings.taps - 1, 2 * self.settings.dim))
        state = self.rule.init_state(params["rule"], batch_size)
        return KeyValueMemory(state, tail, jnp.zeros(batch_size, jnp.int32))

    def encode(
        self, params: Params, items: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Any]:
        """Returns keys and values before the convolution f32 [B, t, C, n, 2d], and the gates."""
        items, mask = (self.cut(x, mask.ndim - 1) for x in convolution.compact(items, mask))
        x = embed(params, items)
        return x @ params["item"], self.rule.gates(params["rule"], x, mask)

    def cut(self, x: Array, axis: int) -> Array:
        """Cuts the items N of a segment into C chunks of n, and pads the last one."""
        n = min(self.settings.chunk, x.shape[axis])
        chunks = -(-x.shape[axis] // n)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, chunks * n - x.shape[axis])
        return jnp.pad(x, pad).reshape(*x.shape[:axis], chunks, n, *x.shape[axis + 1 :])

    def write(
        self,
        params: Params,
        memory: KeyValueMemory,
        features: tuple[Array, Any],
        mask: Array,
        key: Key | None = None,
    ) -> tuple[KeyValueMemory, Sum]:
        """Writes one segment, chunk by chunk."""
        x, gates = features
        batch, chunks, n, width = x.shape
        mask = convolution.in_front(mask, chunks * n)
        x = x.reshape(batch, chunks * n, width)
        x, tail = convolution.causal(params["filters"], memory.tail, x, mask)
        k, v = jnp.moveaxis(jax.nn.silu(x).reshape(batch, chunks, n, 2, self.rule.heads, -1), 3, 0)
        data = norms.unit(k), v, gates
        if chunks == 1:  # the usual case needs no inner loop
            state = self.rule.write(memory.state, *jax.tree.map(lambda y: y[:, 0], data))
        else:
            step = lambda state, chunk: (self.rule.write(state, *chunk), None)
            data = jax.tree.map(lambda y: y.swapaxes(0, 1), data)
            state, _ = jax.lax.scan(step, memory.state, data)
        return KeyValueMemory(state, tail, memory.segments), (jnp.zeros(()), jnp.zeros(()))

    def slots(self, params: Params, memory: KeyValueMemory) -> tuple[Array, Array]:
        """Returns the answers to K learned questions."""
        return learned.slots(self.read, params, memory)

    def read(
        self,
        params: Params,
        memory: KeyValueMemory,
        query: Array,
        query_mask: Array,
        key: Key | None = None,
    ) -> Array:
        """Looks questions up: W_o (norm(value) * silu(W_g q)), as Yang et al. 2024 do."""
        q = jax.nn.silu(query @ params["query"])
        q = norms.unit(q.reshape(*query.shape[:-1], self.rule.heads, -1))
        value = norms.root_mean_square(self.rule.look_up(memory.state, q)).reshape(query.shape)
        gate = jax.nn.silu(query @ params["gate"]["kernel"] + params["gate"]["bias"])
        answer: Array = (value * gate) @ params["out"]
        return answer


def timescale(segments: int, context: Context) -> int:
    """The number of items that an untrained memory of so many segments reaches back."""
    return max(segments * context.segment_length, 2)
