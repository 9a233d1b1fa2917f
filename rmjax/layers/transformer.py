"""Transformer blocks: the segment encoder, and the rehearsal decoder that attends to memory slots."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from rmjax.layers.attention import MultiHeadAttention
from rmjax.layers.dense import Dense
from rmjax.layers.keys import dropout, fold
from rmjax.types import Array, Key


class Block(nn.Module):
    """One pre-norm layer: self-attention over a row, optionally cross-attention to slots, feed-forward of width 4 d.

    x [B, R, X, d] are R rows of X tokens, mask bool [B, R, X]; slots [B, K, d] with slot_mask [B, K]; key [B, R].
    """

    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        slots: Array | None = None,
        slot_mask: Array | None = None,
        key: Key | None = None,
    ) -> Array:
        dim = x.shape[-1]
        norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
        drop = lambda y, i: dropout(y, self.dropout, fold(key, i))
        y = norm("self_norm")(x)
        x = x + drop(MultiHeadAttention(self.heads, self.dtype, name="self")(y, y, mask), 0)
        if slots is not None:
            y = norm("slot_norm")(x).reshape(
                x.shape[0], -1, dim
            )  # the rows of an example share its slots
            y = MultiHeadAttention(self.heads, self.dtype, name="slots")(y, slots, slot_mask)
            x = x + drop(y.reshape(x.shape), 1)
        y = nn.relu(Dense(4 * dim, dtype=self.dtype, name="wide")(norm("wide_norm")(x)))
        return x + drop(
            Dense(dim, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="narrow")(y), 2
        )


class Transformer(nn.Module):
    """`layers` blocks over learned positions, then a layer norm: bidirectional, with or without slots to attend to.

    x [B, R, X, d] -> f32 [B, R, X, d]; padded tokens are never attended to. Parameters have positions for
    the X they were made with; shorter rows use the first ones.

    Raises:
      ValueError: rows are longer than the parameters have positions for.
    """

    layers: int
    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        slots: Array | None = None,
        slot_mask: Array | None = None,
        key: Key | None = None,
    ) -> Array:
        length, dim = x.shape[-2:]
        made = self.has_variable("params", "positions")
        longest = len(self.get_variable("params", "positions")) if made else length
        if length > longest:
            raise ValueError(
                f"rows of {length} tokens, but the parameters have positions for {longest}: make the "
                "machine with a larger segment_length, or cut streams into shorter segments"
            )
        positions = self.param("positions", nn.initializers.normal(0.02), (longest, dim))
        x = (x + (positions if length == longest else positions[:length])).astype(self.dtype)
        if slots is not None:
            slots = slots.astype(self.dtype)
        for i in range(self.layers):
            block = Block(self.heads, self.dropout, self.dtype, name=f"layer_{i}")
            x = block(x, mask, slots, slot_mask, fold(key, i))
        return nn.LayerNorm(dtype=jnp.promote_types(self.dtype, jnp.float32), name="norm")(x)
