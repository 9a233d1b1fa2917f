"""Query encoders (CM Appendix A.1): from a question to its feature q."""

from __future__ import annotations

import jax
from flax.linen.initializers import lecun_normal

from rmjax.layers import recurrent
from rmjax.types import Array, Key, Params


def init_words(key: Key, inputs: int, width: int) -> Params:
    """A bidirectional GRU over words of `inputs` features, and the projection of its last states, `width` wide."""
    a, b = jax.random.split(key)
    return {
        "gru": recurrent.init_bigru(a, inputs, width),
        "project": lecun_normal()(b, (width, width)),
    }


def encode_words(params: Params, words: Array, mask: Array) -> Array:
    """Word features [..., W, d], mask bool [..., W] -> sentence features [..., m]."""
    rows, length = mask.size // mask.shape[-1], mask.shape[-1]
    last = recurrent.bigru(
        params["gru"], words.reshape(rows, length, -1), mask.reshape(rows, length)
    )[1]
    return (last @ params["project"]).reshape(*mask.shape[:-1], -1)
