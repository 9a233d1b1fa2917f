"""The rehearsal memory machine (RM section 3.2): every slot is a state of one shared GRU."""

from __future__ import annotations

import dataclasses
import functools

from rmjax.layers import recurrent
from rmjax.machines import slots
from rmjax.machines.slots import SlotMemory, slot_attention
from rmjax.registry import one_of, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params

__all__ = ["Settings", "SlotMemory", "make", "slot_attention"]


@dataclasses.dataclass(frozen=True)
class Settings(slots.Settings):
    """Settings of the rehearsal machine: those of every slot machine, and the kind of scan."""

    fused: str = setting(
        "off",
        one_of("off", "on", "auto"),
        "one kernel for the scan over segments; on: everywhere, without a GPU slowly; auto: on a "
        "GPU, once the kernel's tests have passed on one",
    )


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`; d_x = d_m = d_model = `dim`."""
    dim = settings.dim

    def init(key: Key) -> Params:
        return recurrent.init_gru(key, dim, dim, settings.timescale)

    def apply(params: Params, slots: Array, aligned: Array) -> Array:
        return recurrent.gru(params, slots, recurrent.gru_input(params, aligned))  # RM Eq. 2

    widths = slots.Widths(dim, dim, dim)
    machine = slots.make(num_items, settings, context, widths, slots.Update(init, apply))
    if settings.fused == "off":
        return machine
    from rmjax.machines import fused  # imports the Triton part of Pallas, which JAX deprecates

    if not fused.wanted(settings.fused):
        return machine
    write_segments = functools.partial(
        fused.write_segments,
        normalize=settings.normalize,
        slot_identity=settings.slot_identity,
        dtype=context.dtype,
    )
    return machine._replace(write_segments=write_segments)
