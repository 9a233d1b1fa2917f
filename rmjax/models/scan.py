"""Scans the `step` of a sequence model. A second call with the returned state continues."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rmjax.io.cost import bounded_loop
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
    skip_padding: bool = False,
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
      skip_padding: a segment that is padding in all B streams costs nothing. Streams can then be
        padded to few lengths, each of which is a program to compile.

    Returns:
      The state after the segments; the results of `per_segment` with leading axis T - silent, zeros
      for skipped segments; and the model's aux, without the silent segments.

    Raises:
      ValueError: tokens and mask are not of one shape [B, T, N], or silent is not in 0 .. T - 1.
    """
    _check(tokens, mask, silent)
    segments = tokens.shape[1]
    every = _by_segment((tokens, mask, inputs, reset), segments, key, gradient_segments)

    def read(speak: Callable[..., Tree], carry: tuple, segment: tuple) -> tuple[tuple, Tree]:
        (state, aux), ((tokens, mask, inputs, reset), key, cut) = carry, segment
        if reset is not None:
            state = model.reset(state, reset)
        if gradient_segments:
            state = jax.tree.map(lambda x: jnp.where(cut, jax.lax.stop_gradient(x), x), state)

        def step(state: Tree) -> tuple[tuple, Tree]:
            hidden, after, more = model.step(params, state, tokens, mask, key)
            return (after, jax.tree.map(jnp.add, aux, more)), speak(hidden, inputs)

        return _unless_padding(mask, step, state, aux) if skip_padding else step(state)

    speak = jax.checkpoint(per_segment, prevent_cse=False) if segments - silent > 1 else per_segment
    no_aux = (jnp.zeros(()), jnp.zeros(()))
    carry = (state, no_aux)
    if silent:
        first = jax.tree.map(lambda x: x[:silent], every)
        carry, _ = jax.lax.scan(functools.partial(read, lambda *_: None), carry, first)
        carry = (jax.lax.stop_gradient(carry[0]), no_aux)  # without the silent segments' aux
    rest = jax.tree.map(lambda x: x[silent:], every)
    (state, aux), results = jax.lax.scan(functools.partial(read, speak), carry, rest)
    return state, results, aux


def truncated(
    model: SequenceModel,
    params: Params,
    state: Tree,
    tokens: Array,
    mask: Array,
    loss: Callable[..., Array],
    inputs: Tree = (),
    key: Key | None = None,
) -> Array:
    """Adds up a loss over T segments; its gradients stay within a segment.

    It is `unroll` with gradient_segments=1, but each segment's gradient is taken as soon as the
    segment is read. So nothing is stored for a backward pass. Segments behind the last token of a
    batch cost nothing, so streams of all lengths can share one program.

    Args:
      model: what reads. The aux of its steps is ignored, see `SequenceModel.has_loss`.
      params: of the model.
      state: of B streams, before the first segment.
      tokens: i32 [B, T, N].
      mask: bool [B, T, N].
      loss: (params, hidden [B, N, D], one segment of `inputs`) -> f32 [].
      inputs: tree of [B, T, ...].
      key: [B] for dropout; segment t draws from fold_in(key, t), as in `unroll`.

    Returns:
      f32 [], the sum over segments. It has gradients for `params` only, of first order.

    Raises:
      ValueError: tokens and mask are not of one shape [B, T, N].
    """
    _check(tokens, mask, 0)
    segments = tokens.shape[1]
    last = jnp.where(mask.any((0, 2)), 1 + jnp.arange(segments), 0).max()  # segments to read

    def read(params: Params, state: Tree, t: Array) -> tuple[Array, Tree]:
        at = lambda x: jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)
        tokens_, mask_, inputs_ = jax.tree.map(at, (tokens, mask, inputs))
        state = jax.lax.stop_gradient(state)
        hidden, state, _ = model.step(params, state, tokens_, mask_, fold(key, t))
        return loss(params, hidden, inputs_), state

    unread = lambda carry: carry[0] < last

    @jax.custom_vjp
    def total(params: Params, state: Tree) -> Array:
        def go(carry: tuple) -> tuple:
            t, state, so_far = carry
            added, state = read(params, state, t)
            return t + 1, state, so_far + added

        return bounded_loop(segments, unread, go, (jnp.int32(0), state, jnp.zeros(())))[-1]

    def forward(params: Params, state: Tree) -> tuple[Array, Params]:
        gradient = jax.value_and_grad(read, has_aux=True)

        def go(carry: tuple) -> tuple:
            t, state, so_far = carry
            (added, state), slope = gradient(params, state, t)
            return t + 1, state, jax.tree.map(jnp.add, so_far, (added, slope))

        none = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return bounded_loop(segments, unread, go, (jnp.int32(0), state, none))[-1]

    def backward(slope: Params, cotangent: Array) -> tuple[Params, None]:
        return jax.tree.map(lambda x: cotangent * x, slope), None

    total.defvjp(forward, backward)
    return total(params, state)


def _unless_padding(
    mask: Array, step: Callable[[Tree], tuple[tuple, Tree]], state: Tree, aux: Sum
) -> tuple[tuple, Tree]:
    """Takes the step; if no token is in the mask, keeps state and aux, and results are zeros."""
    _, results = jax.eval_shape(step, state)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
    return jax.lax.cond(mask.any(), step, lambda state: ((state, aux), nothing), state)


def _by_segment(
    streams: Tree, segments: int, key: Key | None, gradient_segments: int
) -> tuple[Tree, Key | None, Array]:
    """What a scan reads, with leading axis T.

    Returns:
      The streams, of which leaves were [B, T, ...]; the keys [T, B] of the segments; and bool [T],
      true where gradients stop before a segment.
    """
    streams = jax.tree.map(lambda x: x.swapaxes(0, 1), streams)
    number = jnp.arange(segments)
    keys = None if key is None else jax.vmap(lambda t: fold(key, t))(number)
    if not gradient_segments:
        return streams, keys, jnp.zeros(segments, bool)
    return streams, keys, (segments - number) % gradient_segments == 0


def _check(tokens: Array, mask: Array, silent: int) -> None:
    """Refuses arguments of `unroll` that do not fit together."""
    if tokens.shape != mask.shape or tokens.ndim != 3:
        raise ValueError(
            "unroll takes tokens and mask of the same shape [B, T, N], "
            f"got {tokens.shape} and {mask.shape}"
        )
    if not 0 <= silent < tokens.shape[1]:
        raise ValueError(f"silent must be one of 0 .. {tokens.shape[1] - 1}, got {silent}")
