"""The rehearsal model (RM section 3.3.1): a bidirectional decoder that attends to the memory."""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.layers.transformer import Transformer
from rmjax.types import Array, Key, Params


class Decoder(NamedTuple):
    """Decodes [cls] and the items of each fragment, with cross-attention to the slots.

    A layer has self-attention, cross-attention and a feed-forward part.
    """

    transformer: Transformer

    def init(self, key: Key, dim: int, slot_width: int, segment_length: int) -> Params:
        """Draws parameters.

        Args:
          key: draws them.
          dim: width of items, d.
          slot_width: width of slots, e.
          segment_length: items of a fragment, N.

        Returns:
          The decoder, the two tokens [cls] and [mask], and the linear layer of familiarity.
        """
        a, b, c = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, 1 + segment_length, dim))
        mask = jnp.ones((1, 1, 1 + segment_length), bool)
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
        """Decodes F fragments of each of B streams.

        Args:
          params: of `init`.
          x: f32 [B, F, N, d], features of the items.
          mask: bool [B, F, N], true where an item is.
          hidden: bool [B, F, N], the items that [mask] replaces.
          slots: f32 [B, K, e].
          slot_mask: bool [B, K].
          key: [B], draws dropout; None: there is none.

        Returns:
          f32 [B, F, 1 + N, d], r of RM Eq. 3. Entry 0 of each fragment is that of [cls].
        """
        cls, hide = params["tokens"]
        x = jnp.where(hidden[..., None], hide, x)
        x = jnp.concatenate([jnp.broadcast_to(cls, (*x.shape[:2], 1, x.shape[-1])), x], 2)
        mask = jnp.concatenate([jnp.ones_like(mask[..., :1]), mask], -1)
        if key is not None:  # one key for each fragment
            key = jax.vmap(lambda k: jax.random.split(k, x.shape[1]))(key)
        variables = {"params": params["decoder"]}
        return cast(Array, self.transformer.apply(variables, x, mask, slots, slot_mask, key))
