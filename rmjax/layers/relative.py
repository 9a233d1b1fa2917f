"""Self-attention by relative position over what is remembered and what is read (Dai et al. 2019, section 3.3)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import normal

from rmjax.layers.attention import attend
from rmjax.layers.dense import Dense
from rmjax.layers.keys import dropout
from rmjax.types import Array, Key


def sinusoids(distance: Array, dim: int) -> Array:
    """f32 [..., dim]: sines, then cosines, of a distance at dim / 2 wave lengths (Vaswani et al. 2017, 3.5)."""
    rate = 10_000.0 ** (-jnp.arange(0, dim, 2) / dim)
    angle = distance[..., None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[..., :dim]


def shift(scores: Array) -> Array:
    """Scores [..., N, M+N] by distance, the largest (M+N-1) first -> by key, [..., N, M+N]: entry i, j is that of
    distance M + i - j. What lies ahead of a query (j > M + i) is anything.
    """
    *lead, queries, keys = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(lead) + 1) + [(1, 0)])
    return padded.reshape(*lead, keys + 1, queries)[..., 1:, :].reshape(scores.shape)


class RelativeAttention(nn.Module):
    """x [B, N, D] attends to memory [B, M, D] (its newest row last) and itself, causally -> [B, N, D].

    score_ij = ((q_i + u) k_j + (q_i + v) W_r R_(M+i-j)) / sqrt(e), e = D / heads.

    mask bool [B, N], memory_mask bool [B, M]. same_length: every query sees M keys, itself included, in place of all
    that came before it (Dai et al. evaluate so). clamp: distances beyond it count as it, 0: none does.
    """

    heads: int
    dropout: float = 0.0
    same_length: bool = False
    clamp: int = 0
    dtype: jnp.dtype = jnp.float32
    initial: float = 0.02

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, memory: Array, memory_mask: Array, key: Key | None = None
    ) -> Array:
        dim, n, m = x.shape[-1], x.shape[1], memory.shape[1]
        if dim % self.heads:
            raise ValueError(f"width {dim} is not a multiple of heads {self.heads}")
        both = jnp.concatenate([memory.astype(x.dtype), x], 1)

        def project(name: str, y: Array) -> Array:
            y = Dense(
                dim, use_bias=False, dtype=self.dtype, kernel_init=normal(self.initial), name=name
            )(y)
            return y.reshape(*y.shape[:-1], self.heads, -1)

        distance = jnp.arange(m + n - 1, -1, -1, dtype=jnp.float32)
        if self.clamp:
            distance = jnp.minimum(distance, self.clamp)
        query, keys, value = project("query", x), project("key", both), project("value", both)
        relative = project("relative", sinusoids(distance, dim))
        bias = lambda name: self.param(
            name, normal(self.initial), (self.heads, dim // self.heads)
        ).astype(self.dtype)
        u, v = bias("content_bias"), bias("position_bias")
        by_distance = (
            jnp.einsum("bnhe,jhe->bhnj", query + v, relative) * (dim // self.heads) ** -0.5
        )
        i, j = jnp.arange(n)[:, None], jnp.arange(m + n)
        seen = (j <= m + i) & ((j > i) | (not self.same_length))
        seen = seen & jnp.concatenate([memory_mask, mask], 1)[:, None, None, :]
        out, _ = attend(
            query + u,
            keys,
            value,
            seen,
            lambda w: dropout(w, self.dropout, key),
            shift(by_distance),
        )
        return Dense(
            dim, use_bias=False, dtype=self.dtype, kernel_init=normal(self.initial), name="out"
        )(out.reshape(x.shape))
