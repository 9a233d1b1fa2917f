"""Final reasoning layers: from the features a machine's `read` gives to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.types import Array, Key, Params


def init_click(key: Key, width: int, query_width: int, hidden: int) -> Params:
    """Hidden = 0: the single linear layer that RM prints; otherwise one tanh layer of that width before it, which
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


def init_classes(key: Key, width: int, classes: int, hidden: int) -> Params:
    """Hidden = 0: a linear layer to the classes (CM Appendix A.1); otherwise one tanh layer of that width before it."""
    a, b = jax.random.split(key)
    out = {"out": lecun_normal()(b, (hidden or width, classes)), "bias": jnp.zeros(classes)}
    return out | (
        {"hidden": lecun_normal()(a, (width, hidden)), "hidden_bias": jnp.zeros(hidden)}
        if hidden
        else {}
    )


def classify(params: Params, features: Array) -> Array:
    """Features [..., m] -> logits of the classes [..., R]."""
    if "hidden" in params:
        features = jnp.tanh(features @ params["hidden"] + params["hidden_bias"])
    return features @ params["out"] + params["bias"]


def choose(params: Params, features: Array, candidates: Array, mask: Array) -> Array:
    """Features [B, Q, m] read for each question, its candidate answers [B, Q, C, m], mask bool [B, Q, C] -> logits
    [B, Q, C], -inf where there is no candidate (CM Appendix A.1).

    The head is `click`'s with a hidden layer: of one linear layer on [q; a] the softmax would not see q.
    """
    logits = click(params, jnp.broadcast_to(features[:, :, None], candidates.shape), candidates)
    return jnp.where(mask, logits, -jnp.inf)


def cross_entropy(logits: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """Cross-entropy (sum, count) of logits [B, Q, C], target i32 [B, Q], over the asked questions with a right answer
    among the C (0 <= target < C).
    """
    mask = mask & (target >= 0) & (target < logits.shape[-1])
    logits = jnp.where(mask[..., None], logits, 0.0)  # a row without choices is all -inf
    picked = jnp.take_along_axis(logits, jnp.where(mask, target, 0)[..., None], -1)[..., 0]
    loss = jax.nn.logsumexp(logits, -1) - picked
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)


def click_loss(logits: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """Binary cross-entropy (sum, count) over the asked queries; target 1 clicked, 0 not."""
    loss = jax.nn.softplus(logits) - logits * target
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)
