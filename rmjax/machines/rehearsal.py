"""The rehearsal memory machine (RM section 3.2): slots that are the states of one GRU."""

from __future__ import annotations

from rmjax.layers import recurrent
from rmjax.machines import slots
from rmjax.machines.slots import Settings, SlotMemory, slot_attention
from rmjax.types import Array, Context, Key, MemoryMachine, Params

__all__ = ["Settings", "SlotMemory", "make", "slot_attention"]


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """RM's machine, d_x = d_m = d_model."""
    dim = settings.dim

    def init(key: Key) -> Params:
        return recurrent.init_gru(key, dim, dim, settings.timescale)

    def apply(params: Params, slots: Array, aligned: Array) -> Array:
        return recurrent.gru(params, slots, recurrent.gru_input(params, aligned))  # Eq. 2

    return slots.make(
        num_items, settings, context, slots.Widths(dim, dim, dim), slots.Update(init, apply)
    )
