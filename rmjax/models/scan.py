"""Scans the `step` of a sequence model. A second call with the returned state continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rmjax.layers.keys import fold
from rmjax.types import Array, Key, Params, SequenceModel, Sum

Tree = Any  # pytree of arrays


def unroll(
    model: SequenceModel,
    params: Params,
    state: Tree,
    tokens: Array,
    mask: Array,
    per_segment: Callable[..., Tree],
    inputs: Tree = (),
    reset: Array | None = None,
    key: Key | None = None,
    *,
    gradient_segments: int = 1,
    silent: int = 0,
) -> tuple[Tree, Tree, Sum]:
    """Reads T segments with a sequence model.

    Args:
      model: what reads.
      params: of the model.
      state: of B streams, before the first segment.
      tokens: i32 [B, T, N].
      mask: bool [B, T, N].
      per_segment: (hidden [B, N, D], one segment of `inputs`) -> any tree. It is called inside the
        scan, and again in the backward pass. So logits over a large vocabulary never exist for
        several segments at once.
      inputs: tree of [B, T, ...], for instance the targets.
      reset: bool [B, T], true where a stream begins anew before a segment.
      key: [B] for dropout; segment t of this call draws from fold_in(key, t).
      gradient_segments: truncated backpropagation through time. Gradients pass through at most this
        many segments at a time, counted from the last one; 0: through all.
      silent: this many first segments run without gradients and are not passed to `per_segment`.

    Returns:
      The state after the segments; the results of `per_segment` with leading axis T - silent; and
      the model's aux, without the silent segments.

    Raises:
      ValueError: tokens and mask are not of one shape [B, T, N], or silent is not in 0 .. T - 1.
    """
    _check(tokens, mask, silent)
    segments = tokens.shape[1]
    every = jax.tree.map(lambda x: x.swapaxes(0, 1), (tokens, mask, inputs, reset))
    every = (every, *_keys_and_cuts(segments, key, gradient_segments))

    def read(carry: tuple, segment: tuple) -> tuple:
        state, aux = carry
        (tokens, mask, inputs, reset), key, cut = segment
        if reset is not None:
            state = model.reset(state, reset)
        if gradient_segments:
            state = jax.tree.map(lambda x: jnp.where(cut, jax.lax.stop_gradient(x), x), state)
        hidden, state, more = model.step(params, state, tokens, mask, key)
        return (state, jax.tree.map(jnp.add, aux, more)), hidden, inputs

    def read_aloud(carry: tuple, segment: tuple) -> tuple[tuple, Tree]:
        carry, hidden, inputs = read(carry, segment)
        if segments - silent > 1:
            return carry, jax.checkpoint(per_segment, prevent_cse=False)(hidden, inputs)
        return carry, per_segment(hidden, inputs)

    no_aux = (jnp.zeros(()), jnp.zeros(()))
    carry = (state, no_aux)
    if silent:
        read_silently = lambda carry, segment: (read(carry, segment)[0], None)
        first = jax.tree.map(lambda x: x[:silent], every)
        carry, _ = jax.lax.scan(read_silently, carry, first)
        carry = (jax.lax.stop_gradient(carry[0]), no_aux)  # without the silent segments' aux
    rest = jax.tree.map(lambda x: x[silent:], every)
    (state, aux), results = jax.lax.scan(read_aloud, carry, rest)
    return state, results, aux


def _keys_and_cuts(
    segments: int, key: Key | None, gradient_segments: int
) -> tuple[Key | None, Array]:
    """The keys [T, B] of the segments; and bool [T], true where gradients stop before a segment."""
    number = jnp.arange(segments)
    keys = None if key is None else jax.vmap(lambda t: fold(key, t))(number)
    if not gradient_segments:
        return keys, jnp.zeros(segments, bool)
    return keys, (segments - number) % gradient_segments == 0


def _check(tokens: Array, mask: Array, silent: int) -> None:
    """Refuses arguments of `unroll` that do not fit together."""
    if tokens.shape != mask.shape or tokens.ndim != 3:
        raise ValueError(
            "unroll takes tokens and mask of the same shape [B, T, N], "
            f"got {tokens.shape} and {mask.shape}"
        )
    if not 0 <= silent < tokens.shape[1]:
        raise ValueError(f"silent must be one of 0 .. {tokens.shape[1] - 1}, got {silent}")
