"""Final reasoning layers: from the features a machine's `read` gives to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.types import Array, Key, Params


def init_click(key: Key, width: int, hidden: int) -> Params:
    """hidden = 0: the single linear layer that RM prints; otherwise one tanh layer of that width before it."""
    a, b = jax.random.split(key)
    params = {"out": lecun_normal()(b, (hidden or width, 1)), "bias": jnp.zeros(1)}
    if hidden:
        params |= {"hidden": lecun_normal()(a, (width, hidden)), "hidden_bias": jnp.zeros(hidden)}
    return params


def click(params: Params, features: Array) -> Array:
    """features [B, Q, m] -> logit of a click [B, Q] (RM supplement A: a confidence score by a linear layer)."""
    if "hidden" in params:
        features = jnp.tanh(features @ params["hidden"] + params["hidden_bias"])
    return (features @ params["out"] + params["bias"])[..., 0]


def click_loss(logits: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """Binary cross-entropy (sum, count) over the asked queries; target 1 clicked, 0 not."""
    loss = jax.nn.softplus(logits) - logits * target
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)
