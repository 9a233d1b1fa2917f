"""Layers of attention by relative position over a memory and a segment (Dai et al. 2019, 3.3)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.layers.attention import attend
from rmjax.layers.dense import Dense
from rmjax.layers.keys import dropout, fold
from rmjax.types import Array, Key


def sinusoids(distance: Array, dim: int) -> Array:
    """Sinusoids of distances at dim / 2 wave lengths (Vaswani et al. 2017, 3.5).

    Args:
      distance: f32 [...].
      dim: width of the result.

    Returns:
      f32 [..., dim]: sines, then cosines.
    """
    rate = 10_000.0 ** (-jnp.arange(0, dim, 2) / dim)
    angle = distance[..., None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[..., :dim]


def shift(scores: Array) -> Array:
    """Reorders scores from distances to keys.

    Args:
      scores: [..., N, R] for R distances that fall by one, from M+N-1.

    Returns:
      [..., N, R]: entry (i, j) is the score of distance M + i - j. Where that distance is not among
      the R, the score is arbitrary.
    """
    *lead, queries, keys = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(lead) + 1) + [(1, 0)])
    return padded.reshape(*lead, keys + 1, queries)[..., 1:, :].reshape(scores.shape)


class RelativeAttention(nn.Module):
    """Attention of a segment to a memory and to itself, by relative position.

    score_ij = ((q_i + u) k_j + (q_i + v) W_r R_(M+i-j)) / sqrt(e), with e = D / heads.

    Attributes:
      heads: divides D.
      dropout: rate for the weights.
      same_length: each query sees M keys, its own item included, and none before them. Dai et al.
        evaluate so.
      clamp: larger distances count as this one; 0: no limit.
      causal: whether a query sees only its own item and earlier ones of the segment.
      dtype: of the products.
      initial: standard deviation of the initial values.
    """

    heads: int
    dropout: float = 0.0
    same_length: bool = False
    clamp: int = 0
    causal: bool = True
    dtype: jnp.dtype = jnp.float32
    initial: float = 0.02

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, memory: Array, memory_mask: Array, key: Key | None = None
    ) -> Array:
        """Attends.

        Args:
          x: [B, N, D], the segment.
          mask: bool [B, N].
          memory: [B, M, D], its newest row last.
          memory_mask: bool [B, M].
          key: [B], for dropout; None: no dropout.

        Returns:
          [B, N, D].

        Raises:
          ValueError: `heads` does not divide D.
        """
        dim, n, m = x.shape[-1], x.shape[1], memory.shape[1]
        if dim % self.heads:
            raise ValueError(f"width {dim} is not a multiple of heads {self.heads}")
        both = jnp.concatenate([memory.astype(x.dtype), x], 1)

        def linear(name: str) -> Dense:
            init = normal(self.initial)
            return Dense(dim, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)

        def project(name: str, y: Array) -> Array:
            y = linear(name)(y)
            return y.reshape(*y.shape[:-1], self.heads, -1)

        nearest = 0 if self.causal else 1 - n  # items ahead have distances below 0
        distance = jnp.arange(m + n - 1, nearest - 1, -1, dtype=jnp.float32)
        if self.clamp:
            distance = jnp.clip(distance, -self.clamp, self.clamp)
        query, keys, value = project("query", x), project("key", both), project("value", both)
        relative = project("relative", sinusoids(distance, dim))
        sizes = (self.heads, dim // self.heads)
        bias = lambda name: self.param(name, normal(self.initial), sizes).astype(self.dtype)
        u, v = bias("content_bias"), bias("position_bias")
        by_distance = jnp.einsum("bnhe,jhe->bhnj", query + v, relative)
        by_distance = by_distance * (dim // self.heads) ** -0.5
        i, j = jnp.arange(n)[:, None], jnp.arange(m + n)
        seen = ((j <= m + i) | (not self.causal)) & ((j > i) | (not self.same_length))
        seen = seen & jnp.concatenate([memory_mask, mask], 1)[:, None, None, :]
        drop = lambda w: dropout(w, self.dropout, key)
        by_key = shift(by_distance)[..., : m + n]
        out, _ = attend(query + u, keys, value, seen, drop, by_key)
        return linear("out")(out.reshape(x.shape))


class RelativeBlock(nn.Module):
    """One layer: `RelativeAttention`, then a feed-forward layer of 4 D.

    Attributes:
      heads: divides D.
      dropout: rate.
      same_length: see `RelativeAttention`.
      clamp: see `RelativeAttention`.
      causal: see `RelativeAttention`.
      prenorm: norms come before the layers; otherwise after the sums (Dai et al. 2019).
      dtype: of the products.
      initial: standard deviation of the initial values.
    """

    heads: int
    dropout: float = 0.0
    same_length: bool = False
    clamp: int = 0
    causal: bool = True
    prenorm: bool = False
    dtype: jnp.dtype = jnp.float32
    initial: float = 0.02

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, memory: Array, memory_mask: Array, key: Key | None = None
    ) -> Array:
        """Applies the layer.

        Args:
          x: [B, N, D], the segment.
          mask: bool [B, N].
          memory: [B, M, D], its newest row last.
          memory_mask: bool [B, M].
          key: [B], for dropout; None: no dropout.

        Returns:
          [B, N, D].
        """
        dim, exact = x.shape[-1], jnp.promote_types(self.dtype, jnp.float32)
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=exact, name=name)
        dense = lambda width, name: Dense(
            width, dtype=self.dtype, kernel_init=normal(self.initial), name=name
        )
        attention = RelativeAttention(
            self.heads, 0.0, self.same_length, self.clamp, self.causal, self.dtype, self.initial,
            name="attention",
        )  # fmt: skip
        before, after = norm("attention_norm"), norm("wide_norm")
        wide, narrow = dense(4 * dim, "wide"), dense(dim, "narrow")
        drop = lambda y, i: dropout(y, self.dropout, fold(key, i))
        feedforward = lambda y: narrow(drop(nn.relu(wide(y)), 2))
        if self.prenorm:
            attended = attention(before(x), mask, before(memory), memory_mask, fold(key, 0))
            x = x + drop(attended, 1)
            return x + drop(feedforward(after(x)), 3)
        x = before(x + drop(attention(x, mask, memory, memory_mask, fold(key, 0)), 1))
        return after(x + drop(feedforward(x), 3))
