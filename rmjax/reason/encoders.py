"""Question encoders (CM Appendix A.1): from the words of a question to its feature q."""

from __future__ import annotations

import jax
from flax.linen.initializers import lecun_normal

from rmjax.layers import recurrent
from rmjax.types import Array, Key, Params


def init_words(key: Key, inputs: int, width: int) -> Params:
    """Draws parameters of a bidirectional GRU, and of the projection of its last states.

    Args:
      key: draws them.
      inputs: width of word features.
      width: of sentence features, m.

    Returns:
      Parameters for `encode_words`.
    """
    a, b = jax.random.split(key)
    return {
        "gru": recurrent.init_bigru(a, inputs, width),
        "project": lecun_normal()(b, (width, width)),
    }


def encode_words(params: Params, words: Array, mask: Array) -> Array:
    """Encodes sentences.

    Args:
      params: of `init_words`.
      words: f32 [..., W, d], word features.
      mask: bool [..., W].

    Returns:
      Sentence features f32 [..., m].
    """
    rows, length = mask.size // mask.shape[-1], mask.shape[-1]
    words, flat = words.reshape(rows, length, -1), mask.reshape(rows, length)
    last = recurrent.bigru(params["gru"], words, flat)[1]
    return (last @ params["project"]).reshape(*mask.shape[:-1], -1)
