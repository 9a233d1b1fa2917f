"""Train steps whose cost depends on their batch and not on the number of items.

The rows of the item table that a batch touches, and their moments, are taken out, trained and put
back. A step does to these rows what it would do to them in the complete table. The other rows
wait: their moments do not decay, and do not move them (lazy Adam). Dense Adam is the same where
every step touches every row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rmjax.layers.embeddings import Rows
from rmjax.types import Array, Params

Path = tuple[str, ...]
Tree = Any  # pytree of parameters, or of an optimizer's state


def touched(ids: Array, num_items: int, axis: str | None = None) -> Array:
    """Finds the different ids that a batch touches.

    Args:
      ids: i32 [M], with repetitions; ids out of range are clipped.
      num_items: rows of the table.
      axis: mapped axis over whose devices the ids are collected; None: one device has all ids.

    Returns:
      i32 [min(M, num_items)], rising. Numbers from num_items on fill the end; they name no row.
    """
    ids = jnp.clip(ids, 0, num_items - 1)
    if axis:
        ids = jax.lax.all_gather(ids, axis, tiled=True)
    unique = jnp.unique(ids, size=min(len(ids), num_items), fill_value=num_items)
    return jnp.where(unique == num_items, num_items + jnp.arange(len(unique)), unique)


def take(tree: Tree, table: Path, ids: Array) -> Tree:
    """Takes rows out of a table and its moments.

    Args:
      tree: parameters, or an optimizer's state.
      table: path of the item table.
      ids: i32 [n], the rows; see `touched`.

    Returns:
      The tree, in which every leaf at `table` has only these rows.
    """
    rows = lambda x: x.at[ids].get(mode="clip", indices_are_sorted=True)
    choose = lambda path, x: rows(x) if ends(path, table) else x
    return jax.tree_util.tree_map_with_path(choose, tree)


def put(tree: Tree, rows: Tree, table: Path, ids: Array) -> Tree:
    """Puts rows back; the inverse of `take`.

    Args:
      tree: with the complete table.
      rows: as `take` returned it, after a step.
      table: path of the item table.
      ids: i32 [n], the rows.

    Returns:
      `tree` with these rows, and everything outside the table, taken from `rows`.
    """

    def leaf(path: tuple, old: Array, new: Array) -> Array:
        if not ends(path, table):
            return new
        return old.at[ids].set(new, mode="drop", indices_are_sorted=True, unique_indices=True)

    return jax.tree_util.tree_map_with_path(leaf, tree, rows)


def as_table(params: Params, table: Path, ids: Array, num_items: int) -> Params:
    """Lets layers look up ids in a table of which only some rows are present.

    Args:
      params: as `take` returned them.
      table: path of the item table.
      ids: i32 [n], the rows that are present.
      num_items: rows of the complete table.

    Returns:
      The parameters, with `Rows` in the place of the table.
    """
    name, *rest = table
    if rest:
        return params | {name: as_table(params[name], tuple(rest), ids, num_items)}
    return params | {name: Rows(ids, params[name], num_items)}


def ends(path: tuple, table: Path) -> bool:
    """Whether the path of a leaf ends with the path of a table.

    Args:
      path: key path, as `jax.tree_util` gives it.
      table: names.

    Returns:
      True for the table itself and for its moments in an optimizer's state.
    """
    return tuple(getattr(key, "key", None) for key in path[-len(table) :]) == table
