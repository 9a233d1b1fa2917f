"""What machines of slots read a segment with: bidirectional Transformer layers, or a bidirectional GRU."""

from __future__ import annotations

from typing import Any, cast

import jax.numpy as jnp

from rmjax.layers import recurrent
from rmjax.layers.transformer import Transformer
from rmjax.types import Array, Key, Params, SegmentEncoder


def transformer(
    layers: int, heads: int, dropout: float = 0.0, dtype: Any = jnp.float32
) -> SegmentEncoder:
    """RM's segment encoder (section 3.2). Shorter segments use the first of its positions."""
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
        rows = recurrent.bigru(
            params, x.reshape(-1, *x.shape[-2:]), mask.reshape(-1, mask.shape[-1])
        )
        return rows[0].reshape(x.shape)

    return SegmentEncoder(init, apply)
