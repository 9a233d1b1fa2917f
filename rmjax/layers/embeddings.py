"""Item embeddings: one table, shared by the segment encoder, the queries and the rehearsal."""

from __future__ import annotations

from flax.linen.initializers import normal

from rmjax.types import Array, Key, Params


def init_embed(key: Key, num_items: int, dim: int) -> Array:
    """Item table f32 [num_items, dim], rows of about unit length."""
    return normal(dim**-0.5)(key, (num_items, dim))


def embed(params: Params, items: Array) -> Array:
    """items i32 [...] -> rows of params['embed'], f32 [..., d]. Sources check ids; a padded entry may hold anything."""
    return params["embed"].at[items].get(mode="clip")
