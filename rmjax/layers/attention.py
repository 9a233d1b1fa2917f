"""Masked softmax, multi-head dot-product attention, and additive scores w . tanh(a + b)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.dense import Dense
from rmjax.types import Array


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def masked_softmax(x: Array, mask: Array | None, axis: int = -1) -> Array:
    """Softmax over the entries that a mask allows; zeros where it allows none.

    Args:
      x: f32 [...].
      mask: bool, broadcastable to x; None: all entries.
      axis: of x, over which the weights sum to 1.

    Returns:
      Weights, of the shape of x.
    """
    if mask is None:
        return jax.nn.softmax(x, axis)
    e = jnp.where(mask, x, jnp.finfo(x.dtype).min)
    e = jnp.where(
        mask, jnp.exp(e - e.max(axis, keepdims=True, initial=jnp.finfo(x.dtype).min)), 0.0
    )
    return e / jnp.maximum(e.sum(axis, keepdims=True), jnp.finfo(x.dtype).tiny)


@masked_softmax.defjvp
def _masked_softmax_jvp(
    axis: int, primals: tuple[Array, Array | None], tangents: tuple[Array, Array | None]
) -> tuple[Array, Array]:
    """The tangent dy = y (dx - sum of y dx), a function of the weights y alone.

    The weights are zero where the mask is false, so dx need only be finite there. This takes half
    of the passes over memory that the steps of `masked_softmax` would take.
    """
    weights, change = masked_softmax(*primals, axis), tangents[0]
    return weights, weights * (change - (weights * change).sum(axis, keepdims=True))


@jax.custom_vjp
def additive_scores(a: Array, b: Array, w: Array) -> Array:
    """Additive attention scores: score[..., k, n] = w . tanh(a[..., k, :] + b[..., n, :]).

    Uses tanh(a + b) = 1 - 2 / (1 + e^2a e^2b). The exponentials then need no loop over K x N x m;
    that loop has one product and one division left. The backward pass computes it again, so no
    array of size K x N x m is stored.

    Args:
      a: f32 [..., K, m].
      b: f32 [..., N, m].
      w: f32 [m].

    Returns:
      f32 [..., K, N].
    """
    return w.sum() - 2.0 * _sigmoids(a, b) @ w


def _sigmoids(a: Array, b: Array) -> Array:
    """1 / (1 + e^2a e^2b), [..., K, N, m]. a and b are clipped so that e^2a and e^2b fit in f32."""
    ea, eb = jnp.exp(2.0 * a.clip(-40.0, 40.0)), jnp.exp(2.0 * b.clip(-40.0, 40.0))
    return 1.0 / (1.0 + ea[..., :, None, :] * eb[..., None, :, :])


def _additive_forward(a: Array, b: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    return additive_scores(a, b, w), (a, b, w)


def _additive_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    a, b, w = saved
    s = _sigmoids(a, b)
    d_w = g.sum() - 2.0 * jnp.einsum("...kn,...knm->m", g, s)
    slope = g[..., None] * (s - s * s)  # tanh' = 4 s (1 - s)
    d_a, d_b = 4.0 * w * slope.sum(-2), 4.0 * w * slope.sum(-3)
    return d_a, d_b, d_w


additive_scores.defvjp(_additive_forward, _additive_backward)


def identity(key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
    """Initial kernel: the identity if it is square, else `lecun_normal`."""
    if shape[0] == shape[1]:
        return jnp.eye(shape[0], dtype=dtype)
    return lecun_normal()(key, shape, dtype)


def split_heads(x: Array, heads: int) -> Array:
    """Splits x [..., D] into heads, [..., heads, D / heads]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)  # -1 fails for empty arrays


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    drop: Callable[[Array], Array] = lambda weights: weights,
    add: Array | float = 0.0,
) -> tuple[Array, Array]:
    """Scaled dot-product attention of heads (Vaswani et al. 2017, 3.2.1).

    Args:
      query: [..., X, H, e].
      key: [..., Y, H, e].
      value: [..., Y, H, e].
      mask: bool, broadcastable to [..., H, X, Y]; None: every key is seen.
      drop: applied to the weights, such as dropout.
      add: added to the scores, broadcastable to [..., H, X, Y].

    Returns:
      [..., X, H, e]; and the weights before `drop`, [..., H, X, Y], in f32 at least. Both are zero
      for a query that sees no key.
    """
    exact = jnp.promote_types(query.dtype, jnp.float32)
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("...xhd,...yhd->...hxy", query, key, preferred_element_type=exact)
    weights = masked_softmax(scores + add, mask)
    return jnp.einsum("...hxy,...yhd->...xhd", drop(weights).astype(query.dtype), value), weights


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention of `x` over `memory` (Vaswani et al. 2017, 3.2).

    An empty memory adds the output bias only. Value and output kernels begin as identities:
    untrained, the layer returns the average of what it attends to, in the space of the memory.

    Attributes:
      heads: divides the width of x.
      dtype: of the products.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, memory: Array, mask: Array | None) -> Array:
        """Attends.

        Args:
          x: [..., X, d], the queries.
          memory: [..., Y, e].
          mask: bool [..., Y]; None: all of the memory is seen.

        Returns:
          [..., X, d].

        Raises:
          ValueError: `heads` does not divide d.
        """
        dim = x.shape[-1]
        if dim % self.heads:
            raise ValueError(f"width {dim} is not a multiple of heads {self.heads}")

        def project(name: str, y: Array, **options: Any) -> Array:
            y = Dense(dim, dtype=self.dtype, name=name, **options)(y)
            return split_heads(y, self.heads)

        query = project("query", x)
        key = project("key", memory, use_bias=False)  # a bias would not change the softmax
        value = project("value", memory, kernel_init=identity)
        out, _ = attend(query, key, value, None if mask is None else mask[..., None, None, :])
        return Dense(dim, dtype=self.dtype, kernel_init=identity, name="out")(out.reshape(x.shape))
