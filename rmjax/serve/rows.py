"""Rows of live streams: as arrays on the device, and as bytes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.machines.live import LiveStream
from rmjax.serve.database import FORMAT
from rmjax.types import Array, Params


class OnDevice:
    """Rows of streams as arrays on the device; row i belongs to slot i.

    Args:
      blank: an empty stream, leading axis 1; gives the shapes and dtypes.
      capacity: number of rows.
    """

    def __init__(self, blank: LiveStream, capacity: int):
        self._blank = jax.device_put(blank)
        self.rows: LiveStream = jax.tree.map(
            lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), blank
        )

    def take(self, slots: np.ndarray, known: np.ndarray) -> LiveStream:
        """Returns the rows of slots [b] where known [b] is true; empty streams elsewhere."""
        rows: LiveStream = _take(self.rows, slots, known, self._blank)
        return rows

    def put(self, slots: np.ndarray, rows: LiveStream) -> None:
        """Writes rows [b, ...] to slots [b]; slots beyond the last row are skipped."""
        self.rows = _put(self.rows, slots, rows)

    def wait(self) -> None:
        """Returns when the device has finished every `put`."""
        jax.block_until_ready(self.rows)  # type: ignore[no-untyped-call]

    def grow(self, capacity: int) -> None:
        """Appends rows up to the new capacity."""
        more = lambda x: jnp.concatenate([x, jnp.zeros((capacity - len(x), *x.shape[1:]), x.dtype)])
        self.rows = jax.tree.map(more, self.rows)


@jax.jit
def _take(rows: LiveStream, slots: Array, known: Array, blank: LiveStream) -> LiveStream:

    def row(x: Array, empty: Array) -> Array:
        is_known = known.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(is_known, x.at[slots].get(mode="clip"), empty)

    taken: LiveStream = jax.tree.map(row, rows, blank)
    return taken


@functools.partial(jax.jit, donate_argnums=0)
def _put(rows: LiveStream, slots: Array, new: LiveStream) -> LiveStream:
    changed: LiveStream = jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), rows, new)
    return changed


class Packing:
    """Turns rows of streams into bytes and back: the arrays of a row, one after another.

    Args:
      blank: an empty stream, leading axis 1; gives the shapes and dtypes.

    Attributes:
      size: bytes of a row.
    """

    def __init__(self, blank: LiveStream):
        self._structure = jax.tree.structure(blank)
        self._arrays = {name: np.asarray(x) for name, x in named(blank)}
        self.size = sum(x.nbytes for x in self._arrays.values())

    def pack(self, rows: LiveStream, count: int) -> list[bytes]:
        """Returns the bytes of the first `count` rows [b, ...]; waits for the device."""
        flat = [
            np.ascontiguousarray(np.asarray(x)[:count]).reshape(count, -1).view(np.uint8)
            for x in jax.tree.leaves(rows)
        ]
        return [row.tobytes() for row in np.concatenate(flat, axis=1)]

    def unpack(self, payloads: Sequence[bytes]) -> LiveStream:
        """Returns the rows [b, ...], on the host."""
        table = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), self.size)
        leaves, first = [], 0
        for x in self._arrays.values():
            part = np.ascontiguousarray(table[:, first : first + x.nbytes])
            leaves.append(part.view(x.dtype).reshape(len(payloads), *x.shape[1:]))
            first += x.nbytes
        rows: LiveStream = jax.tree.unflatten(self._structure, leaves)
        return rows


def padded(rows: LiveStream, first: int, batch: int) -> LiveStream:
    """Rows from `first` on, on the host, repeated until the batch is full.

    Args:
      rows: one row, or more than `first`.
      first: the first of several rows.
      batch: number of rows to return.

    Returns:
      Rows [batch, ...].
    """

    def part(x: np.ndarray) -> np.ndarray:
        chosen = np.asarray(x)[first : first + batch] if len(x) > 1 else np.asarray(x)
        return np.resize(chosen, (batch, *x.shape[1:]))

    full: LiveStream = jax.tree.map(part, rows)
    return full


def about(blank: LiveStream, machine: Params, segment_length: int) -> dict[str, Any]:
    """What the rows of a database depend on, as JSON can hold it.

    Args:
      blank: an empty stream, leading axis 1.
      machine: the parameters of the machine.
      segment_length: items of a segment.

    Returns:
      The format, the segment length, a digest of the parameters, and [name, dtype, shape] of each
      array of a row.
    """
    content = hashlib.sha256()
    for _, leaf in named(machine):
        content.update(np.asarray(leaf).tobytes())
    return {
        "format": FORMAT,
        "segment_length": segment_length,
        "machine": content.hexdigest()[:16],
        "rows": [[name, str(x.dtype), list(x.shape[1:])] for name, x in named(blank)],
    }


def stream_lengths(rows: LiveStream) -> np.ndarray:
    """Number of items of each stream [b, ...], i64 [b]: all full segments, and the tail."""
    lengths: np.ndarray = np.asarray(rows.memory.segments, np.int64) * rows.tail.shape[1]
    lengths += np.asarray(rows.tail_len)
    return lengths


def named(tree: Any, separator: str = "/") -> list[tuple[str, Any]]:
    """[(name, leaf)] of every leaf of a tree, such as ('memory/slots', array)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator=separator), x) for p, x in leaves]
