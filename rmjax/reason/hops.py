"""Multi-hop attention over memory slots (CM Appendix A.1; RM section 3.4): how a query reads any memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.types import Array, Key, Params


def init(key: Key, slot_width: int, width: int, hops: int) -> Params:
    """W1, W2, b, w per hop, W_q shared by the hops (the paper prints no hop index on it)."""
    dense = lecun_normal()

    def hop(key: Key) -> Params:
        a, b, c = jax.random.split(key, 3)
        return {
            "query": dense(a, (width, width)),
            "slot": dense(b, (slot_width, width)),
            "bias": jnp.zeros(width),
            "score": dense(c, (width, 1))[:, 0],
        }

    found, *keys = jax.random.split(key, hops + 1)
    # Untrained, q^c is e^c: what is read stays in the slots' space, where the head can hold the query against it.
    read = jnp.eye(width) if slot_width == width else dense(found, (slot_width, width))
    kernel = jnp.concatenate([read, jnp.zeros((width, width))])
    return {"hops": [hop(k) for k in keys], "merge": {"kernel": kernel, "bias": jnp.zeros(width)}}


def multihop(params: Params, query: Array, slots: Array, slot_mask: Array) -> tuple[Array, Array]:
    """q^c = W_q [e^c; q^(c-1)], e^c = sum_k softmax_k(w tanh(W1 q^(c-1) + W2 m_k + b)) m_k.

    query [B, Q, m], slots [B, K, d], slot_mask [B, K] -> q^C [B, Q, m], weights of the last hop [B, Q, K].
    """
    weights = jnp.zeros((*query.shape[:-1], slots.shape[-2]))
    for hop in params["hops"]:
        scores = additive_scores(
            query @ hop["query"], slots @ hop["slot"] + hop["bias"], hop["score"]
        )
        weights = masked_softmax(scores, slot_mask[:, None])
        found = jnp.concatenate([weights @ slots, query], -1)
        query = found @ params["merge"]["kernel"] + params["merge"]["bias"]
    return query, weights
