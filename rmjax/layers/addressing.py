"""How a controller addresses an external memory (DNC, Graves et al. 2016, Methods).

The memory M has K slots of width W, R heads read it, and one head writes. Leading axes may be any.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rmjax.types import Array

EPSILON = 1e-6  # inside the root of a norm, so that an empty slot has a finite gradient
TIE = 1e-6  # decides the order of nearly equal usages, see `allocate`


def cosine(memory: Array, keys: Array) -> Array:
    """Cosine similarities; an empty slot is similar to nothing.

    Args:
      memory: f32 [..., K, W].
      keys: f32 [..., R, W].

    Returns:
      f32 [..., R, K].
    """
    scale = lambda x: jax.lax.rsqrt(jnp.square(x).sum(-1) + EPSILON)
    products = keys @ memory.swapaxes(-1, -2)
    return products * scale(keys)[..., :, None] * scale(memory)[..., None, :]


def content(memory: Array, keys: Array, strengths: Array) -> Array:
    """Weights over slots by their similarity to keys, C(M, k, beta).

    Args:
      memory: f32 [..., K, W].
      keys: f32 [..., R, W].
      strengths: f32 [..., R], beta >= 0.

    Returns:
      f32 [..., R, K], which sum to 1 over K.
    """
    return jax.nn.softmax(strengths[..., None] * cosine(memory, keys), -1)


def update_usage(usage: Array, written: Array, read: Array, free: Array) -> Array:
    """Usage rises where the last step wrote, and falls where freed heads read: u_t.

    No gradient passes to the write weights, as in DeepMind's code.

    Args:
      usage: f32 [..., K], u_(t-1) in [0, 1].
      written: f32 [..., K], write weights of the last step.
      read: f32 [..., R, K], read weights of the last step.
      free: f32 [..., R], free gates in [0, 1].

    Returns:
      f32 [..., K].
    """
    written = jax.lax.stop_gradient(written)
    retained = jnp.prod(1.0 - free[..., None] * read, -2)  # psi
    return (usage + written - usage * written) * retained


def allocate(usage: Array) -> Array:
    """Weights over slots that prefer the least used: a_t.

    In rising order of usage a slot gets (1 - its usage) times the product of the usages before it.
    The product is the exponential of a sum over pairs of slots. Slot i comes before a later slot j
    unless its usage is larger by TIE * (j - i). So usages that differ by rounding alone keep one
    order: the backward pass computes them again, with other rounding, and must find the same.

    Args:
      usage: f32 [..., K] in [0, 1].

    Returns:
      f32 [..., K], which sum to at most 1.
    """
    usage = EPSILON + (1.0 - EPSILON) * usage  # no product is zero
    in_order = TIE * jnp.arange(usage.shape[-1])
    rank = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(usage) + in_order))
    before = rank[..., None, :] < rank[..., :, None]
    return (1.0 - usage) * jnp.exp(jnp.where(before, jnp.log(usage)[..., None, :], 0.0).sum(-1))


def erase_and_add(memory: Array, weights: Array, erase: Array, value: Array) -> Array:
    """M (1 - w e^T) + w v^T; a slot with weight 0 stays bit for bit.

    Args:
      memory: f32 [..., K, W].
      weights: f32 [..., K], w.
      erase: f32 [..., W], e in [0, 1].
      value: f32 [..., W], v.

    Returns:
      f32 [..., K, W].
    """
    outer = functools.partial(jnp.einsum, "...k,...w->...kw", weights)
    return memory * (1.0 - outer(erase)) + outer(value)
