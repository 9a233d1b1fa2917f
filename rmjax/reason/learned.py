"""Slots of a memory that has none: the answers to K learned questions."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.types import Array, Key, Memory, Params


def init(key: Key, slots: int, width: int) -> Array:
    """Draws the questions, f32 [K, m] with entries of unit variance."""
    return normal(1.0)(key, (slots, width))


def slots(
    read: Callable[[Params, Memory, Array, Array], Array], params: Params, memory: Memory
) -> tuple[Array, Array]:
    """Reads the slots, see `MemoryMachine.slots`.

    Args:
      read: of the machine.
      params: of the machine; the entry 'slots' is from `init`.
      memory: of B streams.

    Returns:
      f32 [B, K, m], and a mask bool [B, K] without holes.
    """
    questions = params["slots"]
    asked = jnp.broadcast_to(questions, (len(memory.segments), *questions.shape))
    mask = jnp.ones(asked.shape[:2], bool)
    return read(params, memory, asked, mask), mask
