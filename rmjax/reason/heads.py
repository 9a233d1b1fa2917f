"""Final reasoning layers: from the features a machine's `read` gives to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.types import Array, Key, Params


def init_click(key: Key, width: int, query_width: int, hidden: int) -> Params:
    """hidden = 0: the single linear layer that RM prints; otherwise one tanh layer of that width before it, which
    also sees the product of features and query (`width` == `query_width`).

    Untrained, the tanh layer's units answer by the inner product of features and query, half of them each way round:
    from random kernels a match is learned after hundreds of steps.
    """
    a, b = jax.random.split(key)
    inputs = width + query_width
    if not hidden:
        return {"out": lecun_normal()(b, (inputs, 1)), "bias": jnp.zeros(1)}
    sign = jnp.where(jnp.arange(hidden) % 2, 1.0, -1.0)
    match = jnp.broadcast_to(sign * width**-0.5, (width, hidden))
    return {
        "hidden": jnp.concatenate([0.3 * lecun_normal()(a, (inputs, hidden)), match]),
        "hidden_bias": jnp.zeros(hidden),
        "out": 0.3 * hidden**-0.5 * sign[:, None],
        "bias": jnp.zeros(1),
    }


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
