"""Multi-hop attention (RM section 3.4; CM Appendix A.1): how a question reads any memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers import norms
from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.types import Array, Context, Key, Memory, Params


def init(key: Key, slot_width: int, width: int, context: Context) -> Params:
    """Draws parameters.

    Args:
      key: draws them.
      slot_width: of slots, d_m.
      width: of questions, d_model.
      context: has the number of hops, C in CM, and what else the reader does.

    Returns:
      W1, W2, b and w of each hop, and W_q, which all hops share: the paper prints no hop index on
      it. With a norm its scale, and with mixed slots an attention layer for each round.
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

    def mixer(key: Key) -> Params:
        kernels = zip(("query", "key", "value"), jax.random.split(key, 3), strict=True)
        # Before training a round adds nothing.
        return {"out": jnp.zeros((width, slot_width))} | {
            name: dense(draw, (slot_width, width)) for name, draw in kernels
        }

    first, *keys = jax.random.split(key, context.hops + 1)
    # Before training q^c is e^c. The answer then lies in the space of the slots, so the head can
    # compare it with the question.
    read = jnp.eye(width) if slot_width == width else dense(first, (slot_width, width))
    kernel = jnp.concatenate([read, jnp.zeros((width, width))])
    params = {"hops": [hop(k) for k in keys], "merge": {"kernel": kernel, "bias": jnp.zeros(width)}}
    if context.norm_hops:
        params["norm"] = {"scale": jnp.ones(width)}
    if context.mix_slots:
        rounds = jax.random.split(jax.random.fold_in(key, 1), context.mix_slots)
        params["mix"] = [mixer(k) for k in rounds]
    return params


def mix(params: Params, slots: Array, slot_mask: Array) -> Array:
    """Lets slots attend to each other in one round of scaled dot-product attention.

    It returns m_k + W_o sum_j softmax_j(W_q m_k . W_k m_j / sqrt m) W_v m_j for each slot k. The
    papers do not have this step. Slots exchange nothing when they are written, so facts in
    different slots meet in the reader alone.

    Args:
      params: a round of `init`.
      slots: f32 [B, K, d].
      slot_mask: bool [B, K].

    Returns:
      f32 [B, K, d].
    """
    query, key, value = (slots @ params[name] for name in ("query", "key", "value"))
    scores = query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
    return slots + masked_softmax(scores, slot_mask[:, None]) @ value @ params["out"]


def multihop(params: Params, query: Array, slots: Array, slot_mask: Array) -> tuple[Array, Array]:
    """Reads the slots in several hops (CM Appendix A.1, without a number).

    Hop c computes q^c = W_q [e^c; q^(c-1)], where
    e^c = sum_k softmax_k(w tanh(W1 q^(c-1) + W2 m_k + b)) m_k.

    Two steps are off by default, since the papers do not have them. With `mix`, slots attend to
    each other before the first hop. With `norm`, q^c has a layer norm before the next hop.

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
    for round_ in params.get("mix", ()):
        slots = mix(round_, slots, slot_mask)
    for number, hop in enumerate(params["hops"]):
        if number and "norm" in params:
            query = norms.layer(query) * params["norm"]["scale"]
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
