"""Final reasoning layers and their losses: from the features that `read` returns to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.types import Array, Key, Params, Sum


def init_click(key: Key, width: int, query_width: int, hidden: int) -> Params:
    """Draws the head for clicks.

    With a hidden layer, the untrained units answer by the inner product of features and query. Half
    of them have a plus sign, half a minus sign. From random kernels a match takes hundreds of
    steps to learn.

    Args:
      key: draws the kernels.
      width: of the features.
      query_width: of the query.
      hidden: 0: the single linear layer that RM prints. Otherwise a tanh layer of that width comes
        before it, which also sees features * query; then `width` must equal `query_width`.

    Returns:
      Parameters for `click`.
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
    """Returns the logit of a click (RM section 4.3.3, CM Appendix A.1).

    Args:
      params: of `init_click`.
      features: f32 [..., m], read for the queries.
      query: f32 [..., d].

    Returns:
      f32 [...].
    """
    x = jnp.concatenate([features, query], -1)
    if "hidden" in params:
        # Whether the answer matches the question is a product. A layer that sees only sums of the
        # two learns it late or never.
        x = jnp.concatenate([x, features * query], -1)
        x = jnp.tanh(x @ params["hidden"] + params["hidden_bias"])
    logits: Array = x @ params["out"] + params["bias"]
    return logits[..., 0]


def init_classes(key: Key, width: int, classes: int, hidden: int) -> Params:
    """Draws the head for a fixed set of answers (CM Appendix A.1).

    Args:
      key: draws the kernels.
      width: of the features.
      classes: number of answers, R.
      hidden: 0: a linear layer. Otherwise a tanh layer of that width comes before it.

    Returns:
      Parameters for `classify`.
    """
    a, b = jax.random.split(key)
    out = {"out": lecun_normal()(b, (hidden or width, classes)), "bias": jnp.zeros(classes)}
    if not hidden:
        return out
    return out | {"hidden": lecun_normal()(a, (width, hidden)), "hidden_bias": jnp.zeros(hidden)}


def classify(params: Params, features: Array) -> Array:
    """Returns the logits of the answers (CM Appendix A.1).

    Args:
      params: of `init_classes`.
      features: f32 [..., m].

    Returns:
      f32 [..., R].
    """
    if "hidden" in params:
        features = jnp.tanh(features @ params["hidden"] + params["hidden_bias"])
    logits: Array = features @ params["out"] + params["bias"]
    return logits


def choose(params: Params, features: Array, candidates: Array, mask: Array) -> Array:
    """Returns the logits of candidate answers (CM Appendix A.1).

    Args:
      params: of `init_click` with a hidden layer. After a single linear layer on [q; a] the softmax
        over candidates would not depend on q.
      features: f32 [B, Q, m], read for each question.
      candidates: f32 [B, Q, C, m].
      mask: bool [B, Q, C].

    Returns:
      f32 [B, Q, C], -inf where there is no candidate.
    """
    logits = click(params, jnp.broadcast_to(features[:, :, None], candidates.shape), candidates)
    return jnp.where(mask, logits, -jnp.inf)


def cross_entropy(logits: Array, target: Array, mask: Array) -> Sum:
    """Returns the cross-entropy of the asked questions whose target is one of the answers.

    Args:
      logits: f32 [B, Q, C].
      target: i32 [B, Q]. A question counts only if 0 <= target < C.
      mask: bool [B, Q].

    Returns:
      The sum, and the number of questions that count.
    """
    mask = mask & (target >= 0) & (target < logits.shape[-1])
    logits = jnp.where(mask[..., None], logits, 0.0)  # a row without choices is all -inf
    picked = jnp.take_along_axis(logits, jnp.where(mask, target, 0)[..., None], -1)[..., 0]
    loss = jax.nn.logsumexp(logits, -1) - picked
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)


def click_loss(logits: Array, target: Array, mask: Array) -> Sum:
    """Returns the binary cross-entropy of the asked questions.

    Args:
      logits: f32 [B, Q].
      target: i32 [B, Q]: 1 clicked, 0 not.
      mask: bool [B, Q].

    Returns:
      The sum, and the number of asked questions.
    """
    loss = jax.nn.softplus(logits) - logits * target
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)
