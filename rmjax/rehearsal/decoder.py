"""The rehearsal model (RM section 3.3.1): a bidirectional decoder over fragments that attends to the memory."""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.layers.transformer import Transformer
from rmjax.types import Array, Key, Params


class Decoder(NamedTuple):
    """[cls] and the items of each fragment through self-attention, cross-attention to the slots, feed-forward."""

    transformer: Transformer

    def init(self, key: Key, dim: int, slot_width: int, segment_length: int) -> Params:
        a, b, c = jax.random.split(key, 3)
        x, mask = (
            jnp.zeros((1, 1, 1 + segment_length, dim)),
            jnp.ones((1, 1, 1 + segment_length), bool),
        )
        slots, slot_mask = jnp.zeros((1, 1, slot_width)), jnp.ones((1, 1), bool)
        return {
            "decoder": self.transformer.init(a, x, mask, slots, slot_mask)["params"],
            "tokens": normal(dim**-0.5)(b, (2, dim)),  # [cls], [mask]
            "familiar": {"kernel": lecun_normal()(c, (dim, 1)), "bias": jnp.zeros(1)},
        }

    def __call__(
        self,
        params: Params,
        x: Array,
        mask: Array,
        hidden: Array,
        slots: Array,
        slot_mask: Array,
        key: Key | None = None,
    ) -> Array:
        """X [B, F, N, d] features of the fragments' items, mask, hidden bool [B, F, N], slots [B, K, e], key [B]
        -> [B, F, 1 + N, d], entry 0 of each fragment its [cls].
        """
        cls, hide = params["tokens"]
        x = jnp.where(hidden[..., None], hide, x)
        x = jnp.concatenate([jnp.broadcast_to(cls, (*x.shape[:2], 1, x.shape[-1])), x], 2)
        mask = jnp.concatenate([jnp.ones_like(mask[..., :1]), mask], -1)
        if key is not None:  # each fragment draws for itself
            key = jax.vmap(lambda k: jax.random.split(k, x.shape[1]))(key)
        return cast(
            Array,
            self.transformer.apply({"params": params["decoder"]}, x, mask, slots, slot_mask, key),
        )
