"""A memory of two speeds (Rae et al. 2020): what falls out of a short queue is compressed into a second one."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers import queue
from rmjax.layers.queue import Queue
from rmjax.types import Array, Params


@flax.struct.dataclass
class Compressed:
    """What one layer remembers: `recent`, its newest inputs; `old`, those before them, `rate` of them in one row."""

    recent: Queue
    old: Queue

    @property
    def rows(self) -> Array:
        """[B, M_old + M_recent, D], the newest last."""
        return jnp.concatenate([self.old.rows, self.recent.rows], 1)

    @property
    def mask(self) -> Array:
        return jnp.concatenate([self.old.mask, self.recent.mask], 1)


def empty(
    batch_size: int, recent: int, old: int, dim: int, dtype: jnp.dtype = jnp.float32
) -> Compressed:
    return Compressed(
        queue.empty(batch_size, recent, dim, dtype), queue.empty(batch_size, old, dim, dtype)
    )


def reset(memory: Compressed, where: Array) -> Compressed:
    return Compressed(queue.reset(memory.recent, where), queue.reset(memory.old, where))


def init_compression(key: Array, dim: int, rate: int) -> Params:
    """Kernel [rate D, D] and bias of a convolution whose stride is its width. Untrained it is near the mean."""
    mean = jnp.tile(jnp.eye(dim) / rate, (rate, 1))
    return {"kernel": mean + 0.1 * lecun_normal()(key, (rate * dim, dim)), "bias": jnp.zeros(dim)}


def compress(params: Params, rows: Array, mask: Array) -> tuple[Array, Array]:
    """Rows [B, N, D], the valid ones at the end -> [B, ceil(N / rate), D] and their mask. Groups are counted from the
    end; one that is not full counts its missing rows as zeros.
    """
    batch, n, dim = rows.shape
    rate = params["kernel"].shape[0] // dim
    groups = -(-n // rate)
    missing = [(0, 0), (groups * rate - n, 0)]
    rows = jnp.pad(jnp.where(mask[..., None], rows, 0.0), [*missing, (0, 0)]).reshape(
        batch, groups, rate * dim
    )
    kernel, bias = (params[name].astype(rows.dtype) for name in ("kernel", "bias"))
    return rows @ kernel + bias, jnp.pad(mask, missing).reshape(batch, groups, rate).any(-1)


def push(
    params: Params, memory: Compressed, rows: Array, mask: Array
) -> tuple[Compressed, tuple[Array, Array], tuple[Array, Array]]:
    """-> the memory with rows [B, N, D] in it; what fell out of `recent`, and what it was compressed to, each with its
    mask: between these two the reconstruction loss compares.
    """
    recent, fallen, fallen_mask = queue.push(memory.recent, rows, mask)
    short, short_mask = compress(params, fallen, fallen_mask)
    old, _, _ = queue.push(memory.old, short, short_mask)
    return Compressed(recent, old), (fallen, fallen_mask), (short, short_mask)
