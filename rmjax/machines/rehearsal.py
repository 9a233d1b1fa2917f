"""The rehearsal memory machine (RM section 3.2): slots that are the states of one GRU."""

from __future__ import annotations

from typing import Any

from rmjax.layers import recurrent
from rmjax.machines import slots
from rmjax.machines.slots import SlotMemory, slot_attention
from rmjax.types import Array, Key, MemoryMachine, Params

__all__ = ["SlotMemory", "make", "slot_attention"]


def make(num_items: int, *, dim: int = 64, timescale: int = 50, **settings: Any) -> MemoryMachine:
    """RM's machine over `num_items` item ids, d_x = d_model = `dim`; settings are those of `slots.make`.

    timescale: segments, see `recurrent.init_gru`; without it all slots forget within a few segments, and come to be the
    same.
    """

    def init(key: Key) -> Params:
        return recurrent.init_gru(key, dim, dim, timescale)

    def apply(params: Params, slots: Array, aligned: Array) -> Array:
        return recurrent.gru(params, slots, recurrent.gru_input(params, aligned))  # Eq. 2

    return slots.make(num_items, slots.Update(init, apply), dim=dim, **settings)
