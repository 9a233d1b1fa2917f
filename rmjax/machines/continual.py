"""The continual memory machine (CM section 3.2): slots updated in Z gated subspaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.initializers import orthogonal

from rmjax.layers import recurrent
from rmjax.layers.attention import identity
from rmjax.machines import slots
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params


@dataclasses.dataclass(frozen=True)
class Settings(slots.Settings):
    item_dim: int = setting(0, at_least(0), "continual: width of items, d_x; 0: machine.dim")
    slot_dim: int = setting(0, at_least(0), "continual: width of slots, d_m; 0: machine.dim")
    subspaces: int = setting(4, at_least(1), "continual: gated subspaces, Z; 1: a single head")

    def conflicts(self, config: Any = None) -> Iterator[str]:
        if not self.item_dim:
            yield from super().conflicts(config)
        elif self.item_dim % self.heads:
            yield "{heads} must divide {item_dim}"
        if self.dim % self.subspaces:
            yield "{subspaces} must divide {dim}"


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """CM's machine: d_model = `dim`, d_x = `item_dim`, d_m = `slot_dim`."""
    dim, subspaces, timescale = settings.dim, settings.subspaces, settings.timescale
    item_dim, slot_dim = settings.item_dim or dim, settings.slot_dim or dim
    width = dim // subspaces

    def init(key: Key) -> Params:
        """W^M, W^L and W^O with the subspaces side by side; the Z GRUs stacked."""
        a, b, c = jax.random.split(key, 3)
        # Untrained, W^O brings back what W^M took apart, so a slot that nothing is written to stays what it is.
        apart = jnp.eye(dim) if slot_dim == dim else orthogonal()(a, (slot_dim, dim))
        return {
            "slot": apart,
            "item": identity(b, (item_dim, dim)),
            "gru": jax.vmap(lambda key: recurrent.init_gru(key, width, width, timescale))(
                jax.random.split(c, subspaces)
            ),
            "merge": apart.T,
        }

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], subspaces, width)

    def apply(params: Params, slots: Array, aligned: Array) -> Array:
        m, l = split(slots @ params["slot"]), split(aligned @ params["item"])  # noqa: E741  Eq. 2
        gate = lambda p, m, l: recurrent.gru(p, m, recurrent.gru_input(p, l))  # noqa: E731, E741
        new = jax.vmap(gate, (0, -2, -2), -2)(params["gru"], m, l)  # Eq. 3
        return new.reshape(*new.shape[:-2], dim) @ params["merge"]

    widths = slots.Widths(dim, item_dim, slot_dim)
    return slots.make(num_items, settings, context, widths, slots.Update(init, apply))
