"""Attention: masked softmax, multi-head dot-product attention, and additive scores w.tanh(a + b)."""

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
    """Softmax of `x` over the entries of `axis` where `mask` (broadcastable) is true; zeros over an empty set."""
    if mask is None:
        return jax.nn.softmax(x, axis)
    e = jnp.where(mask, x, jnp.finfo(x.dtype).min)
    e = jnp.where(
        mask, jnp.exp(e - e.max(axis, keepdims=True, initial=jnp.finfo(x.dtype).min)), 0.0
    )
    return e / jnp.maximum(e.sum(axis, keepdims=True), jnp.finfo(x.dtype).tiny)


@masked_softmax.defjvp
def _masked_softmax_jvp(axis, primals, tangents):
    """Dy = y (dx - sum of y dx), of the weights y alone: they are zero where nothing is seen, so dx need only be finite
    there. Half the passes over memory that the function's own steps would take.
    """
    weights, change = masked_softmax(*primals, axis), tangents[0]
    return weights, weights * (change - (weights * change).sum(axis, keepdims=True))


@jax.custom_vjp
def additive_scores(a: Array, b: Array, w: Array) -> Array:
    """score[..., k, n] = w . tanh(a[..., k, :] + b[..., n, :]); a [..., K, m], b [..., N, m], w [m] -> [..., K, N].

    Uses tanh(a + b) = 1 - 2 / (1 + e^2a e^2b): the exponentials leave the K x N x m loop, which is left with one
    product and one division. The backward pass recomputes it, so nothing of size K x N x m is kept.
    """
    return w.sum() - 2.0 * _sigmoids(a, b) @ w


def _sigmoids(a: Array, b: Array) -> Array:
    """1 / (1 + e^2a e^2b) [..., K, N, m]; a and b are clipped to what e^2a can hold in f32, their sum is not."""
    ea, eb = jnp.exp(2.0 * a.clip(-40.0, 40.0)), jnp.exp(2.0 * b.clip(-40.0, 40.0))
    return 1.0 / (1.0 + ea[..., :, None, :] * eb[..., None, :, :])


def _additive_forward(a, b, w):
    return additive_scores(a, b, w), (a, b, w)


def _additive_backward(saved, g):
    a, b, w = saved
    s = _sigmoids(a, b)
    d_w = g.sum() - 2.0 * jnp.einsum("...kn,...knm->m", g, s)
    slope = g[..., None] * (s - s * s)  # tanh' = 4 s (1 - s)
    d_a, d_b = 4.0 * w * slope.sum(-2), 4.0 * w * slope.sum(-3)
    return d_a, d_b, d_w


additive_scores.defvjp(_additive_forward, _additive_backward)


def identity(key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
    """Initial kernel: the identity where it is square."""
    return (
        jnp.eye(shape[0], dtype=dtype)
        if shape[0] == shape[1]
        else lecun_normal()(key, shape, dtype)
    )


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    drop: Callable[[Array], Array] = lambda weights: weights,
    add: Array | float = 0.0,
) -> tuple[Array, Array]:
    """Scaled dot-product attention of heads (Vaswani et al. 2017, 3.2.1).

    query [..., X, H, e], key, value [..., Y, H, e], mask bool and `add`, to the scores, broadcastable to [..., H, X, Y]
    -> [..., X, H, e], weights [..., H, X, Y] in f32 at least, before `drop`; both are zero where nothing may be seen.
    """
    exact = jnp.promote_types(query.dtype, jnp.float32)
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("...xhd,...yhd->...hxy", query, key, preferred_element_type=exact)
    weights = masked_softmax(scores + add, mask)
    return jnp.einsum("...hxy,...yhd->...xhd", drop(weights).astype(query.dtype), value), weights


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention of `x` over `memory` (Vaswani et al. 2017, 3.2).

    x [..., X, d], memory [..., Y, e], mask bool [..., Y] -> [..., X, d]; an empty memory adds the output bias only.
    Untrained it returns the average of what it attends to, in its own space: value and output kernels are identities.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, memory: Array, mask: Array | None) -> Array:
        dim = x.shape[-1]
        if dim % self.heads:
            raise ValueError(f"width {dim} is not a multiple of heads {self.heads}")

        def project(name: str, y: Array, **how: Any) -> Array:
            y = Dense(dim, dtype=self.dtype, name=name, **how)(y)
            return y.reshape(*y.shape[:-1], self.heads, dim // self.heads)

        query = project("query", x)
        key = project("key", memory, use_bias=False)  # the softmax would not see it
        value = project("value", memory, kernel_init=identity)
        out, _ = attend(query, key, value, None if mask is None else mask[..., None, None, :])
        return Dense(dim, dtype=self.dtype, kernel_init=identity, name="out")(out.reshape(x.shape))
