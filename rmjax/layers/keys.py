"""Dropout drawn per example: the mask of a row depends on that row's key alone, on any number of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rmjax.types import Array, Key


def fold(key: Key | None, data: int | Array) -> Key | None:
    """`fold_in` for a key array of any shape; None stays None. `data` is one number or an array of the keys' shape."""
    if key is None:
        return None
    fold_in = jax.random.fold_in
    for _ in range(key.ndim):
        fold_in = jax.vmap(fold_in)
    return fold_in(key, jnp.broadcast_to(jnp.asarray(data), key.shape))


def dropout(x: Array, rate: float, key: Key | None) -> Array:
    """Inverted dropout; key [...] are the leading axes of x. `key` None or rate 0 returns x."""
    if key is None or rate == 0.0:
        return x
    rest = x.shape[key.ndim :]
    draw = lambda k: jax.random.bernoulli(k, 1.0 - rate, rest)
    for _ in range(key.ndim):
        draw = jax.vmap(draw)
    return jnp.where(draw(key), x / (1.0 - rate), 0.0)
