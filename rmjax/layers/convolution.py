"""A short causal convolution over a stream that comes in segments.

Every channel has a filter of its own. The last inputs go along from segment to segment.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.types import Array, Key, Params


def init(key: Key, taps: int, width: int) -> Params:
    """Draws the filters. Before training an output is about the sum of two neighbouring items.

    Args:
      key: of the draws.
      taps: number of items that one output sees.
      width: number of channels.

    Returns:
      f32 [taps, width], the present item last.
    """
    neighbours = jnp.arange(taps)[:, None] >= taps - 2
    return jnp.where(neighbours, 1.0, 0.0) + normal(0.02)(key, (taps, width))


def compact(x: Array, mask: Array) -> tuple[Array, Array]:
    """Moves the items of each segment to the front, in their order.

    Args:
      x: [..., N], or [..., N, F].
      mask: bool [..., N].

    Returns:
      The moved x, and its mask bool [..., N].
    """
    order = jnp.argsort(~mask, -1, stable=True)
    order = order.reshape(*order.shape, *[1] * (x.ndim - mask.ndim))
    return jnp.take_along_axis(x, order, mask.ndim - 1), in_front(mask, mask.shape[-1])


def in_front(mask: Array, length: int) -> Array:
    """The mask of segments after `compact`, padded to `length`: bool [..., N] to [..., length]."""
    return jnp.arange(length) < mask.sum(-1, keepdims=True)


def causal(filters: Params, tail: Array, x: Array, mask: Array) -> tuple[Array, Array]:
    """Convolves segments whose items stand in front, see `compact`.

    Args:
      filters: from `init`.
      tail: f32 [B, taps - 1, w], the last inputs before the segment; zeros before the first item.
      x: f32 [B, N, w].
      mask: bool [B, N].

    Returns:
      f32 [B, N, w], and the tail after the segment.
    """
    taps, length = len(filters), x.shape[1]
    inputs = jnp.concatenate([tail, jnp.where(mask[..., None], x, 0.0)], 1)
    y = jnp.zeros_like(x)
    for tap in range(taps):
        y += filters[tap] * inputs[:, tap : tap + length]
    last = mask.sum(1)[:, None] + jnp.arange(taps - 1)
    return y, jnp.take_along_axis(inputs, last[..., None], 1)
