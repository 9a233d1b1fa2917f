"""The Differentiable Neural Computer (DNC, Graves et al. 2016), read after memorizing.

Its own idea among the machines of `mann.py` is the link matrix, which holds the order of the
writes. A head can go on to the slot that was written next, or go back to the one before.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.machines import mann
from rmjax.machines.mann import Settings
from rmjax.types import Array, Context, MemoryMachine, Params

__all__ = ["DNCMemory", "Settings", "make"]


@flax.struct.dataclass
class DNCMemory(mann.MannMemory):
    """The memory of B streams, with G = 1 and J = K."""

    precedence: Array  # f32 [B, 1, K] p, where the last write was
    links: Array  # f32 [B, 1, K, K] L[i, j]: slot i was written after slot j


def look(memory: mann.MannMemory, content: Array, extra: Array) -> mann.MannMemory:
    """Reads by content, or along the links; see `mann.Access.look`."""
    assert isinstance(memory, DNCMemory)
    w, p, before = memory.write_weights, memory.precedence, memory.read_weights
    one, other = w[..., :, None], w[..., None, :]
    links = (1.0 - one - other) * memory.links + one * p[..., None, :]
    links = jnp.where(jnp.eye(w.shape[-1], dtype=bool), 0.0, links)
    backward, forward = before @ links, before @ links.swapaxes(-1, -2)
    modes = jax.nn.softmax(extra, -1)
    read_weights = modes[..., :1] * backward + modes[..., 1:2] * content + modes[..., 2:] * forward
    precedence = (1.0 - w.sum(-1, keepdims=True)) * p + w
    return dataclasses.replace(
        memory, read_weights=read_weights, precedence=precedence, links=links
    )


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    The interface sees the LSTM's output as it is in the paper. Here that output is normalised
    unless `normalize_hidden` is False.
    """
    machine = mann.make(num_items, settings, context, mann.Access(extra=3, look=look))

    def init_memory(params: Params, batch_size: int) -> DNCMemory:
        empty, size = machine.init_memory(params, batch_size), settings.slots
        zeros = jnp.zeros((batch_size, 1, size, size))
        return DNCMemory(**vars(empty), precedence=zeros[..., 0], links=zeros)

    return machine._replace(init_memory=init_memory)
