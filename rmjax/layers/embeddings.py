"""Items as vectors: one table, shared by the segment encoder, the queries and the rehearsal; or features, projected."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.types import Array, Key, Params


def init_embed(key: Key, num_items: int, dim: int) -> Array:
    """Item table f32 [num_items, dim], rows of about unit length."""
    return normal(dim**-0.5)(key, (num_items, dim))


def init_items(key: Key, num_items: int, dim: int, width: int = 0) -> Params:
    """What `embed` reads: a table of `num_items` rows; with `width` one of rows so wide (word vectors from elsewhere)
    and its projection to `dim`. num_items = 0: the projection of features of that width alone.
    """
    if not width:
        return {"embed": init_embed(key, num_items, dim)}
    table, project = jax.random.split(key)
    found = {"embed": init_embed(table, num_items, width)} if num_items else {}
    return found | {"project": lecun_normal()(project, (width, dim))}


def embed(params: Params, items: Array | None) -> Array:
    """Items i32 [...], features f32 [..., F], or None, all items there are, -> f32 [..., d], entries of unit variance.

    That is sqrt(width) times the rows of params['embed'], so that the targets of inner products have unit length
    (Vaswani et al. 2017, 3.4); features are scaled to a mean square of 1. Both then go through params['project'] where
    there is one. Sources check ids; a padded entry may hold anything finite.
    """
    if items is None or not jnp.issubdtype(items.dtype, jnp.floating):
        x = params["embed"] if items is None else look_up(params["embed"], items)
        x *= x.shape[-1] ** 0.5
    else:
        x = items * jax.lax.rsqrt(jnp.square(items).mean(-1, keepdims=True) + 1e-6)
    return x @ params["project"] if "project" in params else x


@flax.struct.dataclass
class Rows:
    """In the place of an item table, those of its rows that a batch asks for."""

    ids: Array  # i32 [M] whose rows, rising
    rows: Array  # f32 [M, width]
    num_items: int = flax.struct.field(pytree_node=False)


def look_up(table: Array | Rows, items: Array) -> Array:
    """Rows [..., width] of items i32 [...]; all of them must be among the `Rows`.

    An id that is none is clipped, so one below 0 is the first: elsewhere in JAX it would count from
    the end.
    """
    items = jnp.clip(items, 0, num_items(table) - 1)
    if isinstance(table, Rows):
        items, table = jnp.searchsorted(table.ids, items).astype(jnp.int32), table.rows
    return table.at[items].get(mode="clip")


def num_items(table: Array | Rows) -> int:
    return table.num_items if isinstance(table, Rows) else len(table)
