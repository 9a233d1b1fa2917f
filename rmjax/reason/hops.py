"""Multi-hop attention (RM section 3.4; CM Appendix A.1): how a question reads any memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.types import Array, Key, Memory, Params


def init(key: Key, slot_width: int, width: int, hops: int) -> Params:
    """Draws parameters.

    Args:
      key: draws them.
      slot_width: of slots, d_m.
      width: of questions, d_model.
      hops: number of hops, C in CM.

    Returns:
      W1, W2, b and w of each hop, and W_q, which all hops share: the paper prints no hop index on
      it.
    """
    dense = lecun_normal()

    def hop(key: Key) -> Params:
        a, b, c = jax.random.split(key, 3)
        return {
            "query": dense(a, (width, width)),  # W1
            "slot": dense(b, (slot_width, width)),  # W2
            "bias": jnp.zeros(width),  # b
            "score": dense(c, (width, 1))[:, 0],  # w
        }

    first, *keys = jax.random.split(key, hops + 1)
    # Before training q^c is e^c. The answer then lies in the space of the slots, so the head can
    # compare it with the question.
    read = jnp.eye(width) if slot_width == width else dense(first, (slot_width, width))
    kernel = jnp.concatenate([read, jnp.zeros((width, width))])
    return {"hops": [hop(k) for k in keys], "merge": {"kernel": kernel, "bias": jnp.zeros(width)}}


def multihop(params: Params, query: Array, slots: Array, slot_mask: Array) -> tuple[Array, Array]:
    """Reads the slots in several hops (CM Appendix A.1, without a number).

    Hop c computes q^c = W_q [e^c; q^(c-1)], where
    e^c = sum_k softmax_k(w tanh(W1 q^(c-1) + W2 m_k + b)) m_k.

    Args:
      params: of `init`.
      query: f32 [B, Q, m], q^0.
      slots: f32 [B, K, d], m_k.
      slot_mask: bool [B, K].

    Returns:
      q^C f32 [B, Q, m], and the weights of the last hop f32 [B, Q, K].
    """
    weights = jnp.zeros((*query.shape[:-1], slots.shape[-2]))
    merge = params["merge"]
    for hop in params["hops"]:
        asked, offered = query @ hop["query"], slots @ hop["slot"] + hop["bias"]
        scores = additive_scores(asked, offered, hop["score"])
        weights = masked_softmax(scores, slot_mask[:, None])
        both = jnp.concatenate([weights @ slots, query], -1)  # [e^c; q^(c-1)]
        query = both @ merge["kernel"] + merge["bias"]
    return query, weights


def reader(slots: Callable[[Params, Memory], tuple[Array, Array]]) -> Callable[..., Array]:
    """The `read` of machines whose questions attend to the slots.

    Args:
      slots: of the machine, as in `MemoryMachine`.

    Returns:
      A `read` as in `MemoryMachine`, with the parameters `params["reader"]`, see `init`.
    """

    def read(
        params: Params, memory: Memory, query: Array, query_mask: Array, key: Key | None = None
    ) -> Array:
        return multihop(params["reader"], query, *slots(params, memory))[0]

    return read
