"""Item embeddings: one table, shared by the segment encoder, the queries and the rehearsal."""

from __future__ import annotations

from flax.linen.initializers import normal

from rmjax.types import Array, Key, Params


def init_embed(key: Key, num_items: int, dim: int) -> Array:
    """Item table f32 [num_items, dim], rows of about unit length."""
    return normal(dim**-0.5)(key, (num_items, dim))


def embed(params: Params, items: Array) -> Array:
    """items i32 [...] -> sqrt(d) times the rows of params['embed'], f32 [..., d].

    So inputs have entries of unit variance, and the targets of inner products unit length (Vaswani et al. 2017, 3.4).
    Sources check ids; a padded entry may hold anything.
    """
    table = params["embed"]
    return table.at[items].get(mode="clip") * table.shape[1] ** 0.5
