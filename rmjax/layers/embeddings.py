"""Items as vectors: rows of one table, or projected features.

The segment encoder, the questions and the rehearsal share the table.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.types import Array, Key, Params


def init_embed(key: Key, num_items: int, dim: int) -> Array:
    """Draws an item table f32 [num_items, dim], rows of about unit length."""
    return normal(dim**-0.5)(key, (num_items, dim))


def init_items(key: Key, num_items: int, dim: int, width: int = 0) -> Params:
    """Draws the parameters of `embed`.

    Args:
      key: of the draws.
      num_items: rows of the table; 0: items are features, and there is no table.
      dim: d.
      width: of the features, or of table rows that come from a file (word vectors); they are
        projected to `dim`. 0: the table has rows of `dim`.

    Returns:
      {embed: [num_items, dim]}; with a width {embed: [num_items, width], project: [width, dim]},
      without `embed` for features.
    """
    if not width:
        return {"embed": init_embed(key, num_items, dim)}
    table, project = jax.random.split(key)
    tables = {"embed": init_embed(table, num_items, width)} if num_items else {}
    return tables | {"project": lecun_normal()(project, (width, dim))}


def embed(params: Params, items: Array | None) -> Array:
    """Vectors of items.

    Rows of the table are multiplied by sqrt(width), so that the targets of inner products have unit
    length (Vaswani et al. 2017, 3.4). Features are scaled to a mean square of 1. Then both go
    through params['project'], if it exists. Sources check ids; a padded entry may hold any finite
    number.

    Args:
      params: from `init_items`.
      items: i32 [...] ids, or f32 [..., F] features; None: all items of the table.

    Returns:
      f32 [..., d], entries of unit variance.
    """
    if items is None or not jnp.issubdtype(items.dtype, jnp.floating):
        x = params["embed"] if items is None else look_up(params["embed"], items)
        x *= x.shape[-1] ** 0.5
    else:
        x = items * jax.lax.rsqrt(jnp.square(items).mean(-1, keepdims=True) + 1e-6)
    return x @ params["project"] if "project" in params else x


@flax.struct.dataclass
class Rows:
    """Stands for an item table, and holds only the rows that a batch reads."""

    ids: Array  # i32 [M], rising
    rows: Array  # f32 [M, width]
    num_items: int = flax.struct.field(pytree_node=False)  # of the table


def look_up(table: Array | Rows, items: Array) -> Array:
    """The rows of items in a table.

    An id out of range is clipped, so an id below 0 is the first. JAX's own indexing would count it
    from the end.

    Args:
      table: f32 [num_items, width], or `Rows` that contain all of the items.
      items: i32 [...].

    Returns:
      f32 [..., width].
    """
    items = jnp.clip(items, 0, num_items(table) - 1)
    if isinstance(table, Rows):
        items, table = jnp.searchsorted(table.ids, items).astype(jnp.int32), table.rows
    return table.at[items].get(mode="clip")


def num_items(table: Array | Rows) -> int:
    """The number of items in a table."""
    return table.num_items if isinstance(table, Rows) else len(table)
