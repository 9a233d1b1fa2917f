"""Remind (Memoria section 3.2): finds short-term and long-term engrams near the working memory.

All code is for one stream; `jax.vmap` it over more. Masks are over slots [C]. Ties are decided by
order of birth, never by slot. So neither the place of an engram nor the capacity changes a result.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

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
from rmjax.types import Array, Key

SEARCH_ROWS = 16  # engrams of a level whose next step is computed together


@flax.struct.dataclass
class Engrams:
    """Up to k engrams, the nearest first."""

    slots: Array  # i32 [k]; C where not valid
    serials: Array  # i32 [k]; -1 where not valid
    valid: Array  # bool [k]
    engrams: Array  # f32 [k, D]; 0 where not valid


@flax.struct.dataclass
class Reminded:
    """The reminded engrams M^rem, and how the search in long-term memory came to its part."""

    short_term: Engrams  # M_stm^rem, k = remind_short_term
    long_term: Engrams  # M_ltm^rem, k = remind_long_term
    seeds: Array  # bool [C] M_ltm^init, where the search began
    found: Array  # bool [C] M_ltm^found, every engram that the search met

    @property
    def engrams(self) -> Array:
        """The vectors f32 [k_short + k_long, D], short-term first."""
        return jnp.concatenate([self.short_term.engrams, self.long_term.engrams], -2)

    @property
    def valid(self) -> Array:
        """The mask bool [k_short + k_long], short-term first."""
        return jnp.concatenate([self.short_term.valid, self.long_term.valid], -1)


@functools.partial(jax.jit, static_argnames="config")
def remind(
    config: MemoriaConfig,
    state: State,
    working: Array,
    key: Key | None = None,
    active: Array | bool = True,
) -> tuple[State, Reminded]:
    """Puts new engrams into working memory, and reminds engrams near them (section 3.2).

    No engram fires or ages yet; `memorize_and_forget` ends the step.

    Args:
      config: sizes and rules.
      state: of one stream.
      working: f32 [N_wm, D], M_wm; no gradient goes into the memory. Working engrams that the
        state still holds are replaced, as if they had never been. If a value is NaN, the oldest
        engrams are reminded, and the rest of the memory stays sound.
      key: decides ties where config.ties is 'random'; otherwise it may be None.
      active: bool []. False returns the state bit for bit, and reminds nothing.

    Returns:
      The state with the new working engrams, and the reminded engrams.

    Raises:
      ValueError: the state or `working` does not have the shape that the config asks for, or a key
        is missing.
    """
    check_state(config, state)
    if working.shape != (config.working, config.dim):
        raise ValueError(
            f"working has shape {working.shape}, expected [{config.working}, {config.dim}] "
            "(config.working, config.dim)"
        )
    check_active(active)
    if key is None and config.ties == "random":
        raise ValueError("config.ties='random' needs a key; or choose 'hash', 'oldest' or 'newest'")
    active = jnp.asarray(active, bool)
    working = jax.lax.stop_gradient(working.astype(jnp.float32))
    if config.checked:
        wrong = active & ~jnp.isfinite(working).all(-1)
        message = "working: engram {i} holds a NaN or an infinity"
        checkify.check(~wrong.any(), message, i=wrong.argmax())
    state = _renumber(config, jax.lax.stop_gradient(state), active)
    state = _add_working(config, state, working, active)  # step 1
    score = correlation(config, state, working)  # steps 2 and 6, all slots at once
    is_short_term = (state.kind == SHORT_TERM) & active
    short_term = _nearest(state, score, is_short_term, config.remind_short_term)  # step 3
    if config.remind_long_term:
        seeds, met = _search(config, state, short_term, key, active)  # steps 4 and 5
    else:
        seeds = met = jnp.zeros(config.capacity, bool)
    long_term = _nearest(state, score, met, config.remind_long_term)  # step 6
    return state, Reminded(short_term, long_term, seeds, met)  # step 7


def _renumber(config: MemoriaConfig, state: State, active: Array) -> State:
    """Gives the living engrams new serials, from 0 by birth, before serials would pass 2^31.

    Serials keep their order. So it stays known which of two engrams is older, and which engrams
    were born before an engram last fired. Ties that a hash of serials decides are drawn again.
    """
    slots = jnp.arange(config.capacity, dtype=jnp.int32)
    largest = np.iinfo(np.int32).max

    def is_full(carry: tuple[Array, Array, Array]) -> Array:
        full: Array = active & (carry[-1] > largest - config.working)
        return full

    def new_serials(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        serial, fired, _ = carry
        alive = state.kind != EMPTY
        number = alive.sum(dtype=jnp.int32)
        rank = jnp.zeros_like(slots).at[state.by_birth].set(slots)
        rising = jnp.where(slots < number, serial[state.by_birth], largest)
        fired = jnp.searchsorted(rising, fired).astype(jnp.int32)
        return jnp.where(alive, rank, -1), fired, -(-number // config.working) * config.working

    carry = (state.serial, state.fired, state.next_serial)
    if config.checked:  # as in `_walk`
        carry = jax.lax.cond(is_full(carry), new_serials, lambda carry: carry, carry)
    else:  # under vmap a loop computes nothing where no stream is full, but a cond would
        carry = jax.lax.while_loop(is_full, new_serials, carry)
    serial, fired, next_serial = carry
    return dataclasses.replace(state, serial=serial, fired=fired, next_serial=next_serial)


def _add_working(config: MemoriaConfig, state: State, working: Array, active: Array) -> State:
    """Step 1: adds the new engrams; they replace working engrams that the state still holds."""
    slots = jnp.where(active, working_slots(config, state), config.capacity)
    first = state.next_serial - jnp.where((state.kind == WORKING).any(), config.working, 0)
    serials = first + jnp.arange(config.working, dtype=jnp.int32)
    born = {
        "engrams": working,
        "kind": WORKING,
        "lifespan": config.initial_lifespan,
        "serial": serials,
        "age": 0,
        "fired": 0,
    }
    new = {
        name: getattr(state, name).at[slots].set(value, mode="drop") for name, value in born.items()
    }
    after = jnp.where(active, first + config.working, state.next_serial)
    return dataclasses.replace(state, **new, next_serial=after)


def correlation(config: MemoriaConfig, state: State, working: Array) -> Array:
    """Step 2: how near each engram is to the working memory, C_i of section 3.2.

    Args:
      config: `correlation` chooses the function f_c.
      state: of one stream.
      working: f32 [N_wm, D].

    Returns:
      f32 [C], in the order of C_i; the values differ from C_i by a rising function.
    """
    # Let c be the mean of the n working engrams. Then the mean over j of -|x - w_j|^2 is -|x - c|^2
    # up to a constant. The code subtracts first: |x|^2 - 2 x c + |c|^2 loses small differences if
    # all engrams have something large in common.
    n = len(working)
    score = -((n * state.engrams - working.sum(0)) ** 2).sum(-1)
    if config.correlation == "exp":
        # The log of the sum over j of exp(-|x - w_j|^2). The sum itself is 0 in f32 for all but the
        # nearest engrams. -|x - w|^2 = -|x - c|^2 + 2 (x - c) (w - c) - |w - c|^2.
        highest = jax.lax.Precision.HIGHEST  # the default of accelerators would change the choice
        center = working.mean(0)
        spread = working - center
        products = (
            jnp.dot(spread, state.engrams.T, precision=highest)
            - jnp.dot(spread, center, precision=highest)[:, None]
        )
        score = score / n**2
        exponents = 2.0 * products - (spread**2).sum(-1, keepdims=True)
        score = score + jax.nn.logsumexp(exponents, 0)
    return jnp.where(jnp.isnan(score), np.finfo(np.float32).min, score)


def _nearest(state: State, score: Array, among: Array, k: int) -> Engrams:
    """Steps 3 and 6: returns the k best of a mask [C].

    Ties go to the oldest engram, since top_k prefers the first of equal values.
    """
    capacity = len(score)
    _, places = jax.lax.top_k(jnp.where(among, score, -jnp.inf)[state.by_birth], min(k, capacity))
    slots = state.by_birth[places]
    valid = among[slots]
    slots = jnp.where(valid, slots, capacity)
    serials = state.serial.at[slots].get(mode="fill", fill_value=-1)
    engrams = state.engrams.at[slots].get(mode="fill", fill_value=0.0)
    more = max(0, k - capacity)
    return Engrams(
        jnp.pad(slots, (0, more), constant_values=capacity),
        jnp.pad(serials, (0, more), constant_values=-1),
        jnp.pad(valid, (0, more)),
        jnp.pad(engrams, ((0, more), (0, 0))),
    )


def _search(
    config: MemoriaConfig, state: State, short_term: Engrams, key: Key | None, active: Array
) -> tuple[Array, Array]:
    """Steps 4 and 5: returns M_ltm^init and M_ltm^found, both bool [C]."""
    long_term = (state.kind == LONG_TERM) & active
    if config.search_seeds == "full":
        return long_term, long_term
    capacity = config.capacity
    rank = jnp.zeros(capacity, jnp.int32)  # 0: the oldest
    rank = rank.at[state.by_birth].set(jnp.arange(capacity, dtype=jnp.int32))
    salt = _salt(config, state, key)
    seeds = jnp.zeros(capacity, bool)
    if config.remind_short_term:
        prefer = None
        if config.ties in ("random", "hash"):
            prefer = jnp.maximum(_hash(salt, short_term.serials[:, None], state.serial), 1)
        elif config.ties == "newest":
            shape = config.remind_short_term, capacity
            prefer = jnp.broadcast_to(rank.astype(jnp.uint32) + 1, shape)
        to, count = _strongest(state, rank, short_term.slots, long_term, prefer)
        go = short_term.valid & (count >= (0 if config.follow_zero_edges else 1))
        seeds = seeds.at[jnp.where(go, to, capacity)].set(True, mode="drop")
    if config.search_seeds == "all_short_term":
        seeds = _draw_seeds(config, state, short_term, long_term, salt, seeds)
    return seeds, _walk(config, state, seeds, long_term, rank)


def _salt(config: MemoriaConfig, state: State, key: Key | None) -> Array:
    """Returns u32 [], part of every hash of a step: random bits, or the step's number from 1."""
    if config.ties == "random" and key is not None:
        return jax.random.bits(key, dtype=jnp.uint32)
    return (state.next_serial // config.working).astype(jnp.uint32)


def _hash(salt: Array, source: Array, candidate: Array) -> Array:
    """Returns u32 of the broadcast shape; it serves as random bits, new for each salt.

    One hash costs less than one random number.
    """
    source, candidate = source.astype(jnp.uint32), candidate.astype(jnp.uint32)
    h = (
        (candidate * jnp.uint32(0x9E3779B1))
        ^ (source * jnp.uint32(0x85EBCA77))
        ^ (salt * jnp.uint32(0xC2B2AE3D))
    )
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    mixed: Array = h ^ (h >> 12)
    return mixed


def _strongest(
    state: State, rank: Array, slots: Array, to: Array, prefer: Array | None = None
) -> tuple[Array, Array]:
    """Follows the strongest edge of each slot in `slots` [R] to a slot in `to` [C].

    Counts decide: all edges of one engram have the same divisor Count_ii. If edges are equal, the
    one with the highest `prefer` (u32 [R, C], from 1 up) is taken. Without `prefer` it is the edge
    to the oldest engram, which has the lowest `rank` [C].

    Returns:
      The slot [R] where the edge ends, and the count [R]; -1 if `to` is empty.
    """
    capacity = len(rank)
    rows = counts_of(state, slots)
    if prefer is not None:
        rows = jnp.where(to, rows, -1)
        most = rows.max(-1)
        return jnp.where((rows == most[:, None]) & to, prefer, 0).argmax(-1), most
    bits = (capacity - 1).bit_length()
    older = capacity - 1 - rank
    if np.iinfo(rows.dtype).bits - 1 + bits <= 31:
        # Count and age fit into one number, so the rows are read once, not twice.
        best = jnp.where(to, (rows.astype(jnp.int32) << bits) | older, -1).max(-1)
        most, oldest = best >> bits, best & (2**bits - 1)
    else:
        rows = jnp.where(to, rows, -1)
        most = rows.max(-1)
        oldest = jnp.where((rows == most[:, None]) & to, older, -1).max(-1)
    return state.by_birth.at[capacity - 1 - oldest].get(mode="clip"), most


def _draw_seeds(
    config: MemoriaConfig,
    state: State,
    short_term: Engrams,
    long_term: Array,
    salt: Array,
    seeds: Array,
) -> Array:
    """Adds to seeds [C] a long-term engram for each short-term engram that is not reminded.

    The package takes the "row of the last engram" for these, and all counts of that row are 0. So
    any long-term engram may be taken, by the rule for ties.
    """
    capacity = config.capacity
    # By birth the long-term engrams come first, and the short-term engrams after them.
    number = long_term.sum(dtype=jnp.int32)
    places = number + jnp.arange(config.short_term_capacity, dtype=jnp.int32)
    sources = state.by_birth.at[places].get(mode="clip")
    reminded = jnp.zeros(capacity, bool).at[short_term.slots].set(True, mode="drop")
    draws = (state.kind[sources] == SHORT_TERM) & ~reminded[sources] & (places < capacity)
    if config.ties in ("random", "hash"):
        bits = _hash(salt, state.serial[sources], jnp.uint32(0)) >> 8
        share = bits.astype(jnp.float32) / 2**24  # in [0, 1)
        drawn = jnp.minimum((share * number).astype(jnp.int32), number - 1)
    else:
        drawn = jnp.full(places.shape, 0 if config.ties == "oldest" else number - 1)
    to = jnp.where(draws & (number > 0), state.by_birth[drawn], capacity)
    return seeds.at[to].set(True, mode="drop")


_Walk = tuple[Array, Array, Array, Array]  # level i32 [], engrams of this level, of the next, met


def _walk(
    config: MemoriaConfig, state: State, seeds: Array, long_term: Array, rank: Array
) -> Array:
    """Step 5: returns M_ltm^found, every engram that a walk from the seeds meets, bool [C].

    A walk follows its strongest edge to an engram that no walk met at an earlier level. Walks that
    meet go on as one, so a level M_ltm^k is a set. The loop takes a few engrams of it at a time.
    """
    capacity = config.capacity
    width = capacity if config.checked else min(SEARCH_ROWS, capacity)

    def more(carry: _Walk) -> Array:
        level, current, *_ = carry
        return (level < config.search_depth) & current.any()

    def go(carry: _Walk) -> _Walk:
        level, current, ahead, met = carry
        going, slots = jax.lax.top_k(current.astype(jnp.float32), width)
        to, count = _strongest(state, rank, slots, long_term & ~met)
        goes = (going > 0) & (count >= (0 if config.follow_zero_edges else 1))
        ahead = ahead.at[jnp.where(goes, to, capacity)].set(True, mode="drop")
        current = current.at[slots].set(False)
        done = ~current.any()
        return (
            level + done,
            jnp.where(done, ahead, current),
            ahead & ~done,
            jnp.where(done, met | ahead, met),
        )

    carry = (jnp.int32(0), seeds, jnp.zeros(capacity, bool), seeds)
    if config.checked:
        # checkify cannot treat a while_loop under vmap. With this width one pass is one level.
        carry = jax.lax.fori_loop(0, config.search_depth, lambda _, carry: go(carry), carry)
    else:
        carry = jax.lax.while_loop(more, go, carry)
    return carry[-1]
