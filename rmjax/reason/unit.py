"""The activation unit of DIN (Zhou et al. 2018): attention whose scores come from a small network.

The networks of click models score a slot k for a question q from [q, k, q - k, q * k].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.attention import masked_softmax
from rmjax.types import Array, Key, Params

WIDTHS = 80, 40  # of the two hidden layers


def init(key: Key, width: int) -> Params:
    """Draws parameters.

    Args:
      key: of the draws.
      width: of questions and slots, d.

    Returns:
      Kernels and biases of the hidden layers, and the score vector. A bias of the score would not
      change the softmax.
    """
    sizes, dense = (4 * width, *WIDTHS), lecun_normal()
    *keys, last = jax.random.split(key, len(sizes))
    pairs = itertools.pairwise(sizes)
    kernels = [dense(k, pair) for k, pair in zip(keys, pairs, strict=True)]
    biases = [jnp.zeros(size) for size in WIDTHS]
    return {"kernels": kernels, "biases": biases, "score": dense(last, (sizes[-1], 1))[:, 0]}


def attend(
    params: Params,
    query: Array,
    slots: Array,
    slot_mask: Array,
    activation: Callable[[Array], Array],
) -> Array:
    """Reads the slots, weighted by a softmax over their scores.

    Args:
      params: of `init`.
      query: f32 [B, Q, d].
      slots: f32 [B, K, d].
      slot_mask: bool [B, K].
      activation: of the hidden layers; sigmoid in MIMN, ReLU in HPMN.

    Returns:
      f32 [B, Q, d]; zeros where no slot is valid.
    """
    q, k = jnp.broadcast_arrays(query[:, :, None], slots[:, None])
    x = jnp.concatenate([q, k, q - k, q * k], -1)
    for kernel, bias in zip(params["kernels"], params["biases"], strict=True):
        x = activation(x @ kernel + bias)
    return masked_softmax(x @ params["score"], slot_mask[:, None]) @ slots
