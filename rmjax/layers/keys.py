"""Dropout with one key for each example.

The mask of a row depends on the row's key alone, so it is the same on any number of devices.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.types import Array, Key


def fold(key: Key | None, data: int | np.integer | Array) -> Key | None:
    """`jax.random.fold_in` for keys of any shape.

    Args:
      key: keys [...]; None stays None.
      data: one number, or i32 of the keys' shape.

    Returns:
      Keys [...].
    """
    if key is None:
        return None
    fold_in = jax.random.fold_in
    for _ in range(key.ndim):
        fold_in = jax.vmap(fold_in)
    return fold_in(key, jnp.broadcast_to(jnp.asarray(data), key.shape))


def dropout(x: Array, rate: float, key: Key | None) -> Array:
    """Inverted dropout: kept entries are divided by 1 - rate.

    Args:
      x: f32 [...].
      rate: share of entries that become 0; 0: x is returned.
      key: keys, whose axes are the leading axes of x; None: x is returned.

    Returns:
      f32, of the shape of x.
    """
    if key is None or rate == 0.0:
        return x
    # Drawn as one row: XLA unrolls the generator for short minor axes, and compiles for seconds.
    draw = lambda k: jax.random.bernoulli(k, 1.0 - rate, (math.prod(x.shape[key.ndim :]),))
    for _ in range(key.ndim):
        draw = jax.vmap(draw)
    return jnp.where(draw(key).reshape(x.shape), x / (1.0 - rate), 0.0)
