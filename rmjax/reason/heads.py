"""Final reasoning layers: from the features a machine's `read` gives to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.types import Array, Key, Params


def init_click(key: Key, width: int, query_width: int, hidden: int) -> Params:
    """hidden = 0: the single linear layer that RM prints; otherwise one tanh layer of that width before it, which
    also sees the product of features and query (`width` == `query_width`)."""
    a, b = jax.random.split(key)
    inputs = width + query_width
    params = {"out": lecun_normal()(b, (hidden or inputs, 1)), "bias": jnp.zeros(1)}
    if hidden:
        params |= {"hidden": lecun_normal()(a, (inputs + width, hidden)), "hidden_bias": jnp.zeros(hidden)}
    return params


def click(params: Params, features: Array, query: Array) -> Array:
    """Features [B, Q, m] read for queries [B, Q, d] -> logit of a click [B, Q] (RM section 4.3.3, CM Appendix A.1)."""
    x = jnp.concatenate([features, query], -1)
    if "hidden" in params:
        # A match of what was read with what is asked is a product; sums of the two learn it late or never.
        x = jnp.concatenate([x, features * query], -1)
        x = jnp.tanh(x @ params["hidden"] + params["hidden_bias"])
    return (x @ params["out"] + params["bias"])[..., 0]


def click_loss(logits: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """Binary cross-entropy (sum, count) over the asked queries; target 1 clicked, 0 not."""
    loss = jax.nn.softplus(logits) - logits * target
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)
