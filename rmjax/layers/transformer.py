"""Transformer blocks, for the segment encoder and for the rehearsal decoder over memory slots."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from rmjax.layers.attention import MultiHeadAttention
from rmjax.layers.dense import Dense
from rmjax.layers.keys import dropout, fold
from rmjax.types import Array, Key


class Block(nn.Module):
    """One pre-norm layer: self-attention over a row, cross-attention to slots, feed-forward of 4 d.

    Attributes:
      heads: attention heads; divides d.
      dropout: rate.
      dtype: of the products.
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
        """Applies the layer.

        Args:
          x: [B, R, X, d], R rows of X tokens.
          mask: bool [B, R, X].
          slots: [B, K, d], shared by the rows of an example; None: no cross-attention.
          slot_mask: bool [B, K].
          key: [B, R], for dropout; None: no dropout.

        Returns:
          [B, R, X, d].
        """
        dim = x.shape[-1]
        norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
        drop = lambda y, i: dropout(y, self.dropout, fold(key, i))
        y = norm("self_norm")(x)
        x = x + drop(MultiHeadAttention(self.heads, self.dtype, name="self")(y, y, mask), 0)
        if slots is not None:
            y = norm("slot_norm")(x).reshape(x.shape[0], -1, dim)
            y = MultiHeadAttention(self.heads, self.dtype, name="slots")(y, slots, slot_mask)
            x = x + drop(y.reshape(x.shape), 1)
        y = nn.relu(Dense(4 * dim, dtype=self.dtype, name="wide")(norm("wide_norm")(x)))
        zeros = nn.initializers.zeros
        y = Dense(dim, dtype=self.dtype, kernel_init=zeros, name="narrow")(y)
        return x + drop(y, 2)


class Transformer(nn.Module):
    """Bidirectional Transformer: learned positions, `layers` blocks, then a layer norm.

    Parameters have positions for the X of their initialisation; shorter rows use the first ones.

    Attributes:
      layers: number of blocks.
      heads: attention heads; divides d.
      dropout: rate.
      dtype: of the products.
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
        """Applies the layers. Padded tokens are never attended to.

        Args:
          x: [B, R, X, d], R rows of X tokens.
          mask: bool [B, R, X].
          slots: [B, K, d], shared by the rows of an example; None: no cross-attention.
          slot_mask: bool [B, K].
          key: [B, R], for dropout; None: no dropout.

        Returns:
          f32 [B, R, X, d].

        Raises:
          ValueError: rows are longer than the parameters have positions for.
        """
        length, dim = x.shape[-2:]
        made = self.has_variable("params", "positions")
        longest = len(self.get_variable("params", "positions")) if made else length
        if length > longest:
            raise ValueError(
                f"rows of {length} tokens, but the parameters have positions for {longest}: make "
                "the machine with a larger segment_length, or cut streams into shorter segments"
            )
        positions = self.param("positions", nn.initializers.normal(0.02), (longest, dim))
        x = (x + (positions if length == longest else positions[:length])).astype(self.dtype)
        if slots is not None:
            slots = slots.astype(self.dtype)
        for i in range(self.layers):
            block = Block(self.heads, self.dropout, self.dtype, name=f"layer_{i}")
            x = block(x, mask, slots, slot_mask, fold(key, i))
        return nn.LayerNorm(dtype=jnp.promote_types(self.dtype, jnp.float32), name="norm")(x)
