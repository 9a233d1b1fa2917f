"""Items as vectors: one table, shared by the segment encoder, the queries and the rehearsal; or features, projected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.types import Array, Key, Params


def init_embed(key: Key, num_items: int, dim: int) -> Array:
    """Item table f32 [num_items, dim], rows of about unit length."""
    return normal(dim**-0.5)(key, (num_items, dim))


def init_items(key: Key, num_items: int, dim: int, width: int = 0) -> Params:
    """What `embed` reads: a table of `num_items` rows; with `width` one of rows so wide (word vectors from elsewhere)
    and its projection to `dim`. num_items = 0: the projection of features of that width alone."""
    if not width:
        return {"embed": init_embed(key, num_items, dim)}
    table, project = jax.random.split(key)
    found = {"embed": init_embed(table, num_items, width)} if num_items else {}
    return found | {"project": lecun_normal()(project, (width, dim))}


def embed(params: Params, items: Array) -> Array:
    """items i32 [...], or features f32 [..., F] -> f32 [..., d], entries of unit variance.

    That is sqrt(width) times the rows of params['embed'], so that the targets of inner products have unit length
    (Vaswani et al. 2017, 3.4); features are scaled to a mean square of 1. Both then go through params['project'] where
    there is one. Sources check ids; a padded entry may hold anything finite.
    """
    if jnp.issubdtype(items.dtype, jnp.floating):
        x = items * jax.lax.rsqrt(jnp.square(items).mean(-1, keepdims=True) + 1e-6)
    else:
        table = params["embed"]
        x = table.at[items].get(mode="clip") * table.shape[1] ** 0.5
    return x @ params["project"] if "project" in params else x


def embed_all(params: Params) -> Array:
    """All items as rows of about unit length [V, d]: what inner products are taken with."""
    table = params["embed"]
    if "project" not in params:
        return table
    return table @ params["project"] * (table.shape[1] / params["project"].shape[1]) ** 0.5
