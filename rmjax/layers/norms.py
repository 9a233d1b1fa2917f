"""Norms without parameters, over the last axis. Zeros stay zeros, with finite gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rmjax.types import Array

EPSILON = 1e-6  # inside of the root


def unit(x: Array) -> Array:
    """Vectors [..., e] of length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + EPSILON)


def root_mean_square(x: Array, epsilon: float = EPSILON) -> Array:
    """Vectors [..., e] with a mean square of 1 (Zhang & Sennrich 2019)."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


def bounded(x: Array, most: float) -> Array:
    """Vectors [..., e], of which longer ones are cut to a root mean square of `most`."""
    square = jnp.square(x).mean(-1, keepdims=True)
    return x * jnp.minimum(1.0, most * jax.lax.rsqrt(square + EPSILON))


def layer(x: Array, epsilon: float = EPSILON) -> Array:
    """Vectors [..., e] with a mean of 0 and a variance of 1 (Ba et al. 2016)."""
    return root_mean_square(x - x.mean(-1, keepdims=True), epsilon)
