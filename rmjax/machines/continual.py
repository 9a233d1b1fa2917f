"""The continual memory machine (CM section 3.2): slots updated in Z gated subspaces."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.initializers import orthogonal

from rmjax.layers import recurrent
from rmjax.layers.attention import identity
from rmjax.machines import slots
from rmjax.types import Array, Key, MemoryMachine, Params


def make(
    num_items: int,
    *,
    dim: int = 128,
    item_dim: int = 0,
    slot_dim: int = 0,
    subspaces: int = 4,
    timescale: int = 50,
    **settings: Any,
) -> MemoryMachine:
    """CM's machine: d_model = `dim`, d_x = `item_dim`, d_m = `slot_dim` (0: as `dim`), Z = `subspaces` (1: CM's single
    head). timescale as for RM; other settings are those of `slots.make`. Errors: ValueError naming the argument.
    """
    item_dim, slot_dim = item_dim or dim, slot_dim or dim
    if dim % subspaces:
        raise ValueError(f"dim {dim} does not divide among subspaces {subspaces}: change one")
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

    update = slots.Update(init, apply)
    return slots.make(num_items, update, dim=dim, item_dim=item_dim, slot_dim=slot_dim, **settings)
