"""The history sampler (RM section 3.3.2): a teacher that scores fragments.

Unlike the memory machine, the teacher may see the raw stream and the question.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.layers.embeddings import embed, init_items
from rmjax.types import Array, Key, Params


def init(key: Key, num_items: int, dim: int, width: int = 0) -> Params:
    """Draws parameters.

    Args:
      key: draws them.
      num_items: number of item ids. 0: the items are feature vectors.
      dim: d_model.
      width: of feature vectors or of word vectors, see `embeddings.init_items`.

    Returns:
      The teacher's own items, and W1, W2, b and w of RM Eq. 5.
    """
    a, b, c, d = jax.random.split(key, 4)
    dense = lecun_normal()
    return init_items(a, num_items, dim, width) | {
        "query": dense(b, (dim, dim)),  # W1
        "fragment": dense(c, (dim, dim)),  # W2
        "bias": jnp.zeros(dim),  # b
        "score": dense(d, (dim, 1))[:, 0],  # w
    }


def fragment_features(params: Params, items: Array, mask: Array) -> Array:
    """Returns the features h of all segments: the mean of their item features.

    Args:
      params: of `init`.
      items: i32 [B, T, N] ids, or f32 [B, T, N, d_in] features.
      mask: bool [B, T, N].

    Returns:
      f32 [B, T, d]; zeros for an empty segment.
    """

    def mean(segment: tuple[Array, Array]) -> Array:
        items, mask = segment
        x = jnp.where(mask[..., None], embed(params, items), 0.0)
        return x.sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]

    # 50 segments at a time, so that the item features of a long stream never exist all at once.
    time_first = items.swapaxes(0, 1), mask.swapaxes(0, 1)
    return jax.lax.map(mean, time_first, batch_size=50).swapaxes(0, 1)


def attend(params: Params, query: Array, features: Array, valid: Array) -> tuple[Array, Array]:
    """Attends to fragments (RM Eq. 5).

    Args:
      params: of `init`.
      query: f32 [B, Q, d], q.
      features: f32 [B, T, d], h.
      valid: bool [B, Q, T], the segments before each question.

    Returns:
      Scores beta f32 [B, Q, T] before the softmax, and e f32 [B, Q, d]. The reasoning feature is
      a = [e; q].
    """
    asked, offered = query @ params["query"], features @ params["fragment"] + params["bias"]
    scores = additive_scores(asked, offered, params["score"])
    return scores, masked_softmax(scores, valid) @ features


def uniform_scores(key: Key, shape: tuple[int, ...]) -> Array:
    """Draws scores for the random sampler of RM Table 5; the largest are a uniform choice.

    Args:
      key: [B].
      shape: of one row.

    Returns:
      f32 [B, *shape].
    """
    return jax.vmap(lambda k: jax.random.uniform(k, shape))(key)
