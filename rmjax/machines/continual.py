"""The continual memory machine (CM section 3.2): slots updated in Z gated subspaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax.linen.initializers import orthogonal

from rmjax.layers import norms, recurrent
from rmjax.layers.attention import identity
from rmjax.machines import slots
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params


@dataclasses.dataclass(frozen=True)
class Settings(slots.Settings):
    """Settings of the continual machine: those of every slot machine, and four of its own.

    Attributes:
      slot_bound: largest root mean square of a slot. Nothing bounds W^O W^M, through which each
        segment passes the slots. If they grow a little in each segment, they overflow in a long
        stream. The bound is ours.
    """

    item_dim: int = setting(0, at_least(0), "continual: width of items, d_x; 0: machine.dim")
    slot_dim: int = setting(0, at_least(0), "continual: width of slots, d_m; 0: machine.dim")
    subspaces: int = setting(4, at_least(1), "continual: gated subspaces, Z; 1: a single head")
    slot_bound: float = setting(
        0.0, at_least(0), "continual: longer slots are cut to this root mean square; 0: no bound"
    )

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        if not self.item_dim:
            yield from super().conflicts(config)
        elif self.item_dim % self.heads:
            yield "{heads} must divide {item_dim}"
        if self.dim % self.subspaces:
            yield "{subspaces} must divide {dim}"


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    The paper's widths are d_model = `dim`, d_x = `item_dim` and d_m = `slot_dim`.
    """
    dim, subspaces, timescale = settings.dim, settings.subspaces, settings.timescale
    item_dim, slot_dim = settings.item_dim or dim, settings.slot_dim or dim
    width = dim // subspaces

    def init_gru(key: Key) -> Params:
        return recurrent.init_gru(key, width, width, timescale)

    def init(key: Key) -> Params:
        """Draws W^M, W^L and W^O, with the subspaces side by side, and Z stacked GRUs."""
        a, b, c = jax.random.split(key, 3)
        # Before training W^O inverts W^M, so a slot that receives nothing keeps its value.
        apart = jnp.eye(dim) if slot_dim == dim else orthogonal()(a, (slot_dim, dim))
        return {
            "slot": apart,  # W^M  f32 [d_m, d_model]
            "item": identity(b, (item_dim, dim)),  # W^L  f32 [d_x, d_model]
            "gru": jax.vmap(init_gru)(jax.random.split(c, subspaces)),
            "merge": apart.T,  # W^O  f32 [d_model, d_m]
        }

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], subspaces, width)

    def gate(gru: Params, m: Array, l: Array) -> Array:
        return recurrent.gru(gru, m, recurrent.gru_input(gru, l))

    def apply(params: Params, slots: Array, aligned: Array) -> Array:
        m, l = split(slots @ params["slot"]), split(aligned @ params["item"])  # CM Eq. 2
        new = jax.vmap(gate, (0, -2, -2), -2)(params["gru"], m, l)  # CM Eq. 3
        merged: Array = new.reshape(*new.shape[:-2], dim) @ params["merge"]  # W^O Concat(...)
        return norms.bounded(merged, settings.slot_bound) if settings.slot_bound else merged

    widths = slots.Widths(dim, item_dim, slot_dim)
    return slots.make(num_items, settings, context, widths, slots.Update(init, apply))
