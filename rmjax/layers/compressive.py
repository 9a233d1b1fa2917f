"""The Compressive Transformer's memory (Rae et al. 2020).

Rows that leave a first queue are compressed into a second queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers import queue
from rmjax.layers.attention import attend, split_heads
from rmjax.layers.queue import Queue
from rmjax.types import Array, Params, Sum


@flax.struct.dataclass
class Compressed:
    """The memory of one layer."""

    recent: Queue  # the newest inputs
    old: Queue  # the inputs before them, compressed: `rate` inputs make one row

    @property
    def rows(self) -> Array:
        """All rows, [B, M_old + M_recent, D], the newest last."""
        return jnp.concatenate([self.old.rows, self.recent.rows], 1)

    @property
    def mask(self) -> Array:
        """Bool [B, M_old + M_recent], true at valid rows."""
        return jnp.concatenate([self.old.mask, self.recent.mask], 1)


def empty(
    batch_size: int, recent: int, old: int, dim: int, dtype: jnp.dtype = jnp.float32
) -> Compressed:
    """A memory without inputs.

    Args:
      batch_size: B.
      recent: M_recent, rows of the first queue.
      old: M_old, rows of the second queue.
      dim: D.
      dtype: of the rows.

    Returns:
      The memory.
    """
    first, second = (queue.empty(batch_size, size, dim, dtype) for size in (recent, old))
    return Compressed(first, second)


def reset(memory: Compressed, where: Array) -> Compressed:
    """Empties the memories of the streams where `where` [B] is true."""
    return Compressed(queue.reset(memory.recent, where), queue.reset(memory.old, where))


def init_compression(key: Array, dim: int, rate: int) -> Params:
    """Parameters of a convolution whose stride is its width; untrained it is near the mean.

    Args:
      key: of the draws.
      dim: D.
      rate: rows that make one.

    Returns:
      {kernel: f32 [rate D, D], bias: f32 [D]}.
    """
    mean = jnp.tile(jnp.eye(dim) / rate, (rate, 1))
    return {"kernel": mean + 0.1 * lecun_normal()(key, (rate * dim, dim)), "bias": jnp.zeros(dim)}


def compress(params: Params, rows: Array, mask: Array) -> tuple[Array, Array]:
    """Compresses groups of rows into one row each (Rae et al. 2020, section 3.2).

    Groups are counted from the end. In an incomplete group the missing rows are zeros.

    Args:
      params: from `init_compression`.
      rows: [B, N, D], the valid ones at the end.
      mask: bool [B, N].

    Returns:
      [B, ceil(N / rate), D], and the mask bool [B, ceil(N / rate)].
    """
    batch, n, dim = rows.shape
    rate = params["kernel"].shape[0] // dim
    groups = -(-n // rate)
    missing = [(0, 0), (groups * rate - n, 0)]
    rows = jnp.pad(jnp.where(mask[..., None], rows, 0.0), [*missing, (0, 0)])
    rows = rows.reshape(batch, groups, rate * dim)
    kernel, bias = (params[name].astype(rows.dtype) for name in ("kernel", "bias"))
    return rows @ kernel + bias, jnp.pad(mask, missing).reshape(batch, groups, rate).any(-1)


def push(
    params: Params, memory: Compressed, rows: Array, mask: Array
) -> tuple[Compressed, tuple[Array, Array]]:
    """Appends rows to the memory.

    Args:
      params: from `init_compression`.
      memory: of B streams.
      rows: [B, N, D].
      mask: bool [B, N].

    Returns:
      The memory; and the rows [B, N, D] that left the first queue and were compressed, with their
      mask. The reconstruction loss compares them with what they were compressed to.
    """
    recent, fallen, fallen_mask = queue.push(memory.recent, rows, mask)
    old, _, _ = queue.push(memory.old, *compress(params, fallen, fallen_mask))
    return Compressed(recent, old), (fallen, fallen_mask)


def reconstruction_loss(
    block: Params, compression: Params, heads: int, x: Array, mask: Array, old: Array, seen: Array
) -> Sum:
    """The attention-reconstruction loss of one layer (Rae et al. 2020, Algorithm 2).

    It compares the attention of x to the rows that leave the recent memory with the attention of x
    to their compressed rows, without positions. Only `compression` gets gradients.

    Args:
      block: parameters of the layer, a `RelativeBlock` with norms before its layers.
      compression: parameters of the layer's compression.
      heads: attention heads of the layer.
      x: [B, N, D], inputs of the layer.
      mask: bool [B, N].
      old: [B, M, D], the rows that leave.
      seen: bool [B, M], their mask.

    Returns:
      The sum of squared differences, a mean over the width; and the number of queries that have
      rows to attend to.
    """
    block, x, old = jax.lax.stop_gradient((block, x, old))

    def normed(y: Array) -> Array:
        return cast(Array, nn.LayerNorm(epsilon=1e-5).apply({"params": block["attention_norm"]}, y))

    def project(name: str, y: Array) -> Array:
        return split_heads(y @ block["attention"][name]["kernel"].T.astype(y.dtype), heads)

    def attended(rows: Array, rows_mask: Array) -> Array:
        rows = normed(rows)
        keys, values = project("key", rows), project("value", rows)
        return attend(query, keys, values, rows_mask[:, None, None, :])[0]

    query = project("query", normed(x))
    error = attended(old, seen) - attended(*compress(compression, old, seen))
    counted = mask & seen.any(-1, keepdims=True)
    squares = jnp.where(counted[..., None, None], jnp.square(error.astype(jnp.float32)), 0.0)
    return squares.sum() / x.shape[-1], counted.sum().astype(jnp.float32)


def mean_over_layers(losses: Sequence[Sum]) -> Sum:
    """The mean of the layers' losses: a (sum, count) of which both are means over layers."""
    total, count = (sum(part) / len(losses) for part in zip(*losses, strict=True))
    return total, count
