"""Segment after segment: a sequence model's `step`, scanned. Called again with the state it returned, it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rmjax.layers.keys import fold
from rmjax.types import Array, Key, Params, SequenceModel, Sum

Each = Callable[..., Any]


def unroll(
    model: SequenceModel,
    params: Params,
    state: Any,
    tokens: Array,
    mask: Array,
    each: Each,
    given: Any = (),
    reset: Array | None = None,
    key: Key | None = None,
    *,
    gradient_segments: int = 1,
    silent: int = 0,
) -> tuple[Any, Any, Sum]:
    """-> the state after tokens i32 [B, T, N], mask bool [B, T, N]; what `each` made of each segment; the model's aux.

    Args:
      each: (hidden [B, N, D], a segment's part of `given`) -> any tree; the results come back with a leading axis T. It
        is called inside the scan, and again in the backward pass, so that logits over a large vocabulary are never
        there for several segments at once.
      given: tree of [B, T, ...], for instance the targets.
      reset: bool [B, T], true where a stream begins anew before a segment.
      key: [B] for dropout; segment t of this call draws from fold_in(key, t).
      gradient_segments: truncated backpropagation through time: gradients pass through at most so many segments at a
        time, counted from the last one; 0: through all.
      silent: so many first segments run without gradients; `each` does not see them (its results have T - silent
        entries), and the aux is that of the others.
    """
    if tokens.shape != mask.shape or tokens.ndim != 3:
        raise ValueError(
            f"unroll wants tokens and mask of one shape [B, T, N], got {tokens.shape} and {mask.shape}"
        )
    segments = tokens.shape[1]
    if not 0 <= silent < segments:
        raise ValueError(f"silent must be one of 0 .. {segments - 1}, got {silent}")
    number = jnp.arange(segments)
    keys = None if key is None else jax.vmap(lambda t: fold(key, t))(number)
    time_first = lambda tree: jax.tree.map(lambda x: x.swapaxes(0, 1), tree)
    cut = (
        (segments - number) % gradient_segments == 0
        if gradient_segments
        else jnp.zeros(segments, bool)
    )
    everything = (time_first((tokens, mask, given, reset)), keys, cut)

    def read(carry: tuple, segment: tuple) -> tuple:
        state, aux = carry
        (tokens, mask, given, reset), key, cut = segment
        if reset is not None:
            state = model.reset(state, reset)
        if gradient_segments:
            state = jax.tree.map(lambda x: jnp.where(cut, jax.lax.stop_gradient(x), x), state)
        hidden, state, more = model.step(params, state, tokens, mask, key)
        return (state, jax.tree.map(jnp.add, aux, more)), hidden, given

    def quietly(carry, segment):
        return read(carry, segment)[0], None

    def aloud(carry, segment):
        carry, hidden, given = read(carry, segment)
        return carry, (jax.checkpoint(each, prevent_cse=False) if segments - silent > 1 else each)(
            hidden, given
        )

    carry = (state, (jnp.zeros(()), jnp.zeros(())))
    if silent:
        carry, _ = jax.lax.scan(quietly, carry, jax.tree.map(lambda x: x[:silent], everything))
        carry = (
            jax.lax.stop_gradient(carry[0]),
            (jnp.zeros(()), jnp.zeros(())),
        )  # nor have their losses any
    (state, aux), results = jax.lax.scan(
        aloud, carry, jax.tree.map(lambda x: x[silent:], everything)
    )
    return state, results, aux
