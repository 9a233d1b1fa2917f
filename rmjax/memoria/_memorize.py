"""Memorize and forget (Memoria section 3.4).

Engrams that fire together are joined, engrams that helped live longer, and all others fade.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from rmjax.memoria._remind import Reminded
from rmjax.memoria._state import (
    EMPTY,
    LONG_TERM,
    SHORT_TERM,
    WORKING,
    MemoriaConfig,
    State,
    check_active,
    check_state,
    counts_of,
    working_slots,
)
from rmjax.types import Array


@functools.partial(jax.jit, static_argnames="config")
def memorize_and_forget(
    config: MemoriaConfig,
    state: State,
    reminded: Reminded,
    weights: Array,
    active: Array | bool = True,
) -> State:
    """Ends the step that `remind` began (section 3.4).

    Args:
      config: sizes and rules.
      state: of one stream, as `remind` returned it.
      reminded: as `remind` returned it. An engram that the state no longer holds is left out.
      weights: f32 [k_short + k_long], w_i, the contribution of each reminded engram, short-term
        first. Weights of invalid engrams are ignored. Negative, infinite and NaN weights count as
        0; where all are 0, no engram gains lifespan. With config.lifespan_increment='given' the
        weights are lifespans, in steps, and are added as they are.
      active: bool []. False returns the state bit for bit.

    Returns:
      The state after the step.

    Raises:
      ValueError: the state, `reminded` or `weights` does not have the shape that the config asks
        for.
    """
    check_state(config, state)
    _check_weights(config, reminded, weights)
    check_active(active)
    active = jnp.asarray(active, bool)
    capacity = config.capacity
    slots = jnp.concatenate([reminded.short_term.slots, reminded.long_term.slots])
    serials = jnp.concatenate([reminded.short_term.serials, reminded.long_term.serials])
    # A slot may hold another engram by now; a working engram cannot have been reminded.
    remembered = jnp.where(state.kind == WORKING, -1, state.serial)
    held = remembered.at[slots].get(mode="fill", fill_value=-1)
    valid = reminded.valid & active & (held == serials)
    slots = jnp.where(valid, slots, capacity)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    if config.checked:
        _check_values(config, state, reminded, valid, weights, active)

    state = _fire(config, state, slots, active)  # step 1
    gain = _gain(config, state, valid, weights)  # step 2
    lived = state.lifespan.at[slots].add(gain, mode="drop") - 1.0  # steps 2 and 3
    new = _forget_and_move(config, state, lived)  # steps 4 to 6
    new = {name: jnp.where(active, value, getattr(state, name)) for name, value in new.items()}
    return dataclasses.replace(state, **new)


def _check_weights(config: MemoriaConfig, reminded: Reminded, weights: Array) -> None:
    """Raises ValueError unless the config asks for as many reminded engrams and weights."""
    sizes = (config.remind_short_term, config.remind_long_term)
    actual = (*reminded.short_term.slots.shape, *reminded.long_term.slots.shape)
    if actual != sizes:
        raise ValueError(
            f"reminded holds {actual} short-term and long-term engrams, expected {sizes} "
            "(config.remind_short_term, config.remind_long_term): use the config of remind"
        )
    if weights.shape != (sum(sizes),):
        raise ValueError(
            f"weights has shape {weights.shape}, expected [{sum(sizes)}]: one for each reminded "
            f"engram, {sizes[0]} short-term ones first, then {sizes[1]} long-term ones"
        )


def _check_values(
    config: MemoriaConfig,
    state: State,
    reminded: Reminded,
    valid: Array,
    weights: Array,
    active: Array,
) -> None:
    """Checks, under checkify, that the step has begun and that the values can be."""
    begun = (state.kind == WORKING).any()
    message = "state: it has no working engrams, so no step has begun: call remind first"
    checkify.check(begun | ~active, message)
    strange = reminded.valid & active & ~valid
    message = "reminded: entry {i} is not in the state: use the state that remind returned"
    checkify.check(~strange.any(), message, i=strange.argmax())
    fits = jnp.isfinite(weights) & ((weights >= 0) | (config.lifespan_increment == "given"))
    wrong = valid & ~fits
    i = wrong.argmax()
    message = "weights: entry {i} is {w}, not a finite number from 0 up"
    checkify.check(~wrong.any(), message, i=i, w=weights[i])


def _fire(config: MemoriaConfig, state: State, slots: Array, active: Array) -> State:
    """Step 1: adds one to Count_ij for all pairs of M^act, the working engrams and `slots` [k].

    Slot C stands for no engram. A count stops at the largest number of its type. The rows of
    engrams that fire are written in full, which clears counts that earlier owners of a slot left.
    Other rows keep such old counts; `State.fired` shows which are old.
    """
    capacity = config.capacity
    working = working_slots(config, state)
    working = jnp.where(active & (state.kind[working] == WORKING), working, capacity)
    slots = jnp.concatenate([working, slots])
    together = jnp.zeros(capacity, bool).at[slots].set(True, mode="drop")

    rows = counts_of(state, slots)
    rows = rows + (together & (rows < np.iinfo(rows.dtype).max)).astype(rows.dtype)
    return dataclasses.replace(
        state,
        counts=state.counts.at[slots].set(rows, mode="drop"),
        fired=jnp.where(together, state.next_serial, state.fired),
    )


def _gain(config: MemoriaConfig, state: State, valid: Array, weights: Array) -> Array:
    """Step 2: returns Inc_i f32 [k], the lifespan that each reminded engram gains.

    It is 0 where `valid` [k] is false. The kinds of the state must still be those of `remind`.
    """
    if config.lifespan_increment == "given":
        return jnp.where(valid, weights, 0.0)
    weights = jnp.where(valid & (weights > 0) & jnp.isfinite(weights), weights, 0.0)
    number = valid.sum().astype(jnp.float32)  # |M^rem|
    if config.lifespan_increment == "paper":
        total = weights.sum()
        return weights / jnp.where(total > 0, total, 1.0) * (number * config.lifespan_extend)
    # The package's list of reminded engrams has one entry more if a short-term engram is left out.
    left_out = (state.kind == SHORT_TERM).sum() > valid[: config.remind_short_term].sum()
    return weights * (config.lifespan_extend * (number + left_out))


def _forget_and_move(config: MemoriaConfig, state: State, lived: Array) -> dict[str, Array]:
    """Steps 4 to 6: engrams die, move on to the next memory, or are evicted.

    Args:
      config: sizes and rules.
      state: before these steps.
      lived: f32 [C], the lifespans after step 3.

    Returns:
      The fields of the state that change.
    """
    capacity = config.capacity
    alive = state.kind != EMPTY
    lives = alive & (lived > 0)  # step 4; false for NaN
    # Steps 5 and 6. In order of birth come long-term, short-term and working engrams. All but the
    # newest short_term_capacity of them are in long-term memory now.
    counted = lives if config.order == "paper" else alive
    counted = counted[state.by_birth]
    place = jnp.cumsum(counted, dtype=jnp.int32)
    pushed_out = (
        jnp.zeros(capacity, bool)
        .at[state.by_birth]
        .set(place <= place[-1] - config.short_term_capacity)
    )
    kind = jnp.where((state.kind == LONG_TERM) | pushed_out, LONG_TERM, SHORT_TERM)
    kind = jnp.where(lives, kind, EMPTY).astype(state.kind.dtype)

    # Not in the paper: a full long-term memory evicts the engrams with the least lifespan.
    excess = (kind == LONG_TERM).sum(dtype=jnp.int32) - config.long_term
    excess = jnp.maximum(excess, 0)  # at most `working`
    weakest_first = jnp.where(kind == LONG_TERM, -lived, -jnp.inf)[state.by_birth]
    _, places = jax.lax.top_k(weakest_first, config.working)
    evicted = jnp.where(jnp.arange(config.working) < excess, state.by_birth[places], capacity)
    kind = kind.at[evicted].set(EMPTY, mode="drop")

    # Slots in the new order of birth: the living keep their order, free slots come last.
    lives = kind != EMPTY
    living = lives[state.by_birth]
    before = jnp.cumsum(living, dtype=jnp.int32)
    behind = before[-1] + jnp.arange(capacity, dtype=jnp.int32) - before
    place = jnp.where(living, before - 1, behind)
    return {
        "kind": kind,
        "lifespan": jnp.where(lives, lived, 0.0),
        "serial": jnp.where(lives, state.serial, -1),
        "age": jnp.where(lives, state.age + 1, 0),
        "evicted": state.evicted + excess,
        "by_birth": jnp.zeros(capacity, jnp.int32).at[place].set(state.by_birth),
    }
