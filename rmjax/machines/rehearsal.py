"""The rehearsal memory machine (RM section 3.2): every slot is a state of one shared GRU."""

from __future__ import annotations

from rmjax.layers import recurrent
from rmjax.machines import slots
from rmjax.machines.slots import Settings, SlotMemory, slot_attention
from rmjax.types import Array, Context, Key, MemoryMachine, Params

__all__ = ["Settings", "SlotMemory", "make", "slot_attention"]


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`; d_x = d_m = d_model = `dim`."""
    dim = settings.dim

    def init(key: Key) -> Params:
        return recurrent.init_gru(key, dim, dim, settings.timescale)

    def apply(params: Params, slots: Array, aligned: Array) -> Array:
        return recurrent.gru(params, slots, recurrent.gru_input(params, aligned))  # RM Eq. 2

    widths = slots.Widths(dim, dim, dim)
    return slots.make(num_items, settings, context, widths, slots.Update(init, apply))
