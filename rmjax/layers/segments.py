"""Segment encoders: bidirectional Transformer layers, or a bidirectional GRU."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp

from rmjax.layers import recurrent
from rmjax.layers.transformer import Transformer
from rmjax.types import Array, Key, Params, SegmentEncoder


def transformer(
    layers: int, heads: int, dropout: float = 0.0, dtype: jnp.dtype = jnp.float32
) -> SegmentEncoder:
    """The segment encoder of RM section 3.2.

    Args:
      layers: Transformer layers.
      heads: attention heads; divides the width.
      dropout: rate.
      dtype: of matrix products.

    Returns:
      The encoder. Segments shorter than N use the first of its positions.
    """
    model = Transformer(layers, heads, dropout, dtype)

    def init(key: Key, dim: int, length: int) -> Params:
        x, mask = jnp.zeros((1, 1, length, dim)), jnp.ones((1, 1, length), bool)
        return model.init(key, x, mask)["params"]

    def apply(params: Params, items: Array, x: Array, mask: Array, key: Key | None = None) -> Array:
        return cast(Array, model.apply({"params": params}, x, mask, key=key))

    return SegmentEncoder(init, apply)


def bigru() -> SegmentEncoder:
    """The GRU encoder of RM Table 6, for segments of any length."""

    def init(key: Key, dim: int, length: int) -> Params:
        return recurrent.init_bigru(key, dim, dim)

    def apply(params: Params, items: Array, x: Array, mask: Array, key: Key | None = None) -> Array:
        rows, row_mask = x.reshape(-1, *x.shape[-2:]), mask.reshape(-1, mask.shape[-1])
        outputs, _ = recurrent.bigru(params, rows, row_mask)
        return outputs.reshape(x.shape)

    return SegmentEncoder(init, apply)
