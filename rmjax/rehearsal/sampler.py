"""The history sampler (RM section 3.3.2, Eq. 5): a teacher that may see the raw stream, and its fragment scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.layers.embeddings import embed, init_items
from rmjax.types import Array, Key, Params


def init(key: Key, num_items: int, dim: int, width: int = 0) -> Params:
    """The teacher's own items (see `embeddings.init_items`), W1, W2, b, w of Eq. 5."""
    a, b, c, d = jax.random.split(key, 4)
    dense = lecun_normal()
    return init_items(a, num_items, dim, width) | {
        "query": dense(b, (dim, dim)),
        "fragment": dense(c, (dim, dim)),
        "bias": jnp.zeros(dim),
        "score": dense(d, (dim, 1))[:, 0],
    }


def fragment_features(params: Params, items: Array, mask: Array) -> Array:
    """Mean item feature of every segment: items [B, T, N] or [B, T, N, F], mask bool [B, T, N] -> [B, T, d]; zeros for
    an empty one.
    """

    def mean(segment: tuple[Array, Array]) -> Array:
        items, mask = segment
        x = jnp.where(mask[..., None], embed(params, items), 0.0)
        return x.sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]

    # Some segments at a time, so that the items' features of a long stream are never all held.
    return jax.lax.map(mean, (items.swapaxes(0, 1), mask.swapaxes(0, 1)), batch_size=50).swapaxes(
        0, 1
    )


def attend(params: Params, query: Array, features: Array, valid: Array) -> tuple[Array, Array]:
    """Eq. 5. query [B, Q, d]; features [B, T, d]; valid bool [B, Q, T], the segments before each question.

    -> scores beta [B, Q, T] before the softmax; e [B, Q, d], of the reasoning feature a = [e; q].
    """
    scores = additive_scores(
        query @ params["query"], features @ params["fragment"] + params["bias"], params["score"]
    )
    return scores, masked_softmax(scores, valid) @ features


def uniform_scores(key: Key, shape: tuple[int, ...]) -> Array:
    """RM Table 5's random sampler: key [B] -> scores [B, *shape], the largest of which are a uniform draw."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape))(key)
