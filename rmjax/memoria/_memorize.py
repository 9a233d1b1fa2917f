"""Memorize & forget (Memoria section 3.4): what fired together is joined, what helped lives longer, all else fades."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
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
    """Ends the step that `remind` began.

    Args:
      reminded: what `remind` returned. An engram in it that the state no longer holds is left out.
      weights: f32 [k_short + k_long], how much each reminded engram contributed, short-term first. What is said of
        invalid ones is ignored; those that are negative, infinite or NaN count as 0, and where all are 0 nobody gains
        lifespan. With config.lifespan_increment='given' they are lifespan, in steps, added as they are.
      active: bool []; where false the state comes back bit for bit.

    Raises:
      ValueError: the state, `reminded` or `weights` has another shape than the config's.
    """
    check_state(config, state)
    _check_weights(config, reminded, weights)
    check_active(active)
    active = jnp.asarray(active, bool)
    capacity = config.capacity
    slots = jnp.concatenate([reminded.short_term.slots, reminded.long_term.slots])
    serials = jnp.concatenate([reminded.short_term.serials, reminded.long_term.serials])
    remembered = jnp.where(state.kind == WORKING, -1, state.serial)  # who can have been reminded
    valid = (
        reminded.valid & active & (remembered.at[slots].get(mode="fill", fill_value=-1) == serials)
    )
    slots = jnp.where(valid, slots, capacity)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    if config.checked:
        _check_values(config, state, reminded, valid, weights, active)

    state = _fire(config, state, slots, active)
    gain = _gain(config, state, valid, weights)
    lived = state.lifespan.at[slots].add(gain, mode="drop") - 1.0
    fate = _age(config, state, lived)
    return dataclasses.replace(
        state,
        **{name: jnp.where(active, value, getattr(state, name)) for name, value in fate.items()},
    )


def _check_weights(config: MemoriaConfig, reminded: Reminded, weights: Array) -> None:
    sizes = (config.remind_short_term, config.remind_long_term)
    found = (*reminded.short_term.slots.shape, *reminded.long_term.slots.shape)
    if found != sizes:
        raise ValueError(
            f"reminded holds {found} short-term and long-term engrams, expected {sizes} "
            "(config.remind_short_term, config.remind_long_term): it was reminded under another config"
        )
    if weights.shape != (sum(sizes),):
        raise ValueError(
            f"weights has shape {weights.shape}, expected [{sum(sizes)}]: one for each reminded engram, "
            f"{sizes[0]} short-term ones first, then {sizes[1]} long-term ones"
        )


def _check_values(
    config: MemoriaConfig,
    state: State,
    reminded: Reminded,
    valid: Array,
    weights: Array,
    active: Array,
) -> None:
    begun = (state.kind == WORKING).any()
    checkify.check(
        begun | ~active, "state: it has no working engrams, so no step has begun: call remind first"
    )
    strange = reminded.valid & active & ~valid
    message = "reminded: entry {i} is not in the state: it was reminded from another one"
    checkify.check(~strange.any(), message, i=strange.argmax())
    wrong = valid & ~(
        jnp.isfinite(weights) & ((weights >= 0) | (config.lifespan_increment == "given"))
    )
    i = wrong.argmax()
    checkify.check(
        ~wrong.any(), "weights: entry {i} is {w}, not a finite number from 0 up", i=i, w=weights[i]
    )


def _fire(config: MemoriaConfig, state: State, slots: Array, active: Array) -> State:
    """Step 1: counts of all pairs among working engrams and slots [k] (C: none) go up by one, to the largest at most.

    Whole rows of the fired are written, so that what a reused slot left in them is cleared; in rows that do not fire it
    stays, and is known by `fired`.
    """
    capacity = config.capacity
    working = working_slots(config, state)
    working = jnp.where(active & (state.kind[working] == WORKING), working, capacity)
    slots = jnp.concatenate([working, slots])
    together = jnp.zeros(capacity, bool).at[slots].set(True, mode="drop")

    rows = counts_of(state, slots)
    rows = rows + (together & (rows < jnp.iinfo(rows.dtype).max)).astype(rows.dtype)
    return dataclasses.replace(
        state,
        counts=state.counts.at[slots].set(rows, mode="drop"),
        fired=jnp.where(together, state.next_serial, state.fired),
    )


def _gain(config: MemoriaConfig, state: State, valid: Array, weights: Array) -> Array:
    """Step 2: what each reminded engram gains, f32 [k]; 0 where `valid` [k] is false. The state is still remind's."""
    if config.lifespan_increment == "given":
        return jnp.where(valid, weights, 0.0)
    weights = jnp.where(valid & (weights > 0) & jnp.isfinite(weights), weights, 0.0)
    number = valid.sum().astype(jnp.float32)
    if config.lifespan_increment == "paper":
        total = weights.sum()
        return weights / jnp.where(total > 0, total, 1.0) * (number * config.lifespan_extend)
    # The package's list of the reminded has one entry more where a short-term engram is left out.
    left_out = (state.kind == SHORT_TERM).sum() > valid[: config.remind_short_term].sum()
    return weights * (config.lifespan_extend * (number + left_out))


def _age(config: MemoriaConfig, state: State, lived: Array) -> dict[str, Array]:
    """Steps 3 to 6: who dies, who moves on, who is evicted; lived f32 [C] are the lifespans after this step."""
    capacity = config.capacity
    alive = state.kind != EMPTY
    lives = alive & (lived > 0)  # false for NaN
    counted = lives if config.order == "paper" else alive
    # By birth: long-term, short-term, working. The newest short_term_capacity are not yet pushed out.
    counted = counted[state.by_birth]
    place = jnp.cumsum(counted, dtype=jnp.int32)
    pushed_out = (
        jnp.zeros(capacity, bool)
        .at[state.by_birth]
        .set(place <= place[-1] - config.short_term_capacity)
    )
    kind = jnp.where((state.kind == LONG_TERM) | pushed_out, LONG_TERM, SHORT_TERM)
    kind = jnp.where(lives, kind, EMPTY).astype(state.kind.dtype)

    excess = jnp.maximum(
        (kind == LONG_TERM).sum(dtype=jnp.int32) - config.long_term, 0
    )  # at most `working`
    weakest_first = jnp.where(kind == LONG_TERM, -lived, -jnp.inf)[state.by_birth]
    _, places = jax.lax.top_k(weakest_first, config.working)
    evicted = jnp.where(jnp.arange(config.working) < excess, state.by_birth[places], capacity)
    kind = kind.at[evicted].set(EMPTY, mode="drop")

    lives = kind != EMPTY
    living = lives[state.by_birth]
    before = jnp.cumsum(living, dtype=jnp.int32)
    place = jnp.where(
        living, before - 1, before[-1] + jnp.arange(capacity, dtype=jnp.int32) - before
    )
    return {
        "kind": kind,
        "lifespan": jnp.where(lives, lived, 0.0),
        "serial": jnp.where(lives, state.serial, -1),
        "age": jnp.where(lives, state.age + 1, 0),
        "evicted": state.evicted + excess,
        "by_birth": jnp.zeros(capacity, jnp.int32).at[place].set(state.by_birth),
    }
