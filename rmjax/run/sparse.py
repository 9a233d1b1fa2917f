"""Steps that cost what their batch touches: rows of the item table and of its moments are taken out, trained, put back.

What a step does to those rows is what it would do to them in the whole table. The other rows wait: their moments do not
decay, and they do not move by them (lazy Adam; dense Adam is the same where every row is touched in every step).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rmjax.layers.embeddings import Rows
from rmjax.types import Array, Params

Path = tuple[str, ...]


def touched(ids: Array, num_items: int, axis: str | None = None) -> Array:
    """The different ones of ids i32 [M], on all devices of a mapped `axis`: i32 [min(M, num_items)], rising. Behind
    them come numbers from num_items on, which are rows of nothing.
    """
    ids = jnp.clip(ids, 0, num_items - 1)
    if axis:
        ids = jax.lax.all_gather(ids, axis, tiled=True)
    found = jnp.unique(ids, size=min(len(ids), num_items), fill_value=num_items)
    return jnp.where(found == num_items, num_items + jnp.arange(len(found)), found)


def take(tree: Any, table: Path, ids: Array) -> Any:
    """A tree of parameters, or of an optimizer's state: of every leaf at `table` its rows `ids`, the rest as it is."""
    rows = lambda x: x.at[ids].get(mode="clip", indices_are_sorted=True)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: rows(x) if ends(path, table) else x, tree
    )


def put(tree: Any, rows: Any, table: Path, ids: Array) -> Any:
    """The way back: `tree` with those rows, and everything else, as in `rows`."""

    def leaf(path: tuple, old: Any, new: Any) -> Any:
        if not ends(path, table):
            return new
        return old.at[ids].set(new, mode="drop", indices_are_sorted=True, unique_indices=True)

    return jax.tree_util.tree_map_with_path(leaf, tree, rows)


def as_table(params: Params, table: Path, ids: Array, num_items: int) -> Params:
    """Parameters with those rows for a table, in which the layers look up ids."""
    name, *rest = table
    inner = (
        as_table(params[name], tuple(rest), ids, num_items)
        if rest
        else Rows(ids, params[name], num_items)
    )
    return params | {name: inner}


def ends(path: tuple, table: Path) -> bool:
    return tuple(getattr(key, "key", None) for key in path[-len(table) :]) == table
