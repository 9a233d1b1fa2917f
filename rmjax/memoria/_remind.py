"""Remind (Memoria section 3.2): what of short-term and long-term memory lies near the working memory.

Everything is written for one stream; `jax.vmap` it over more. Masks are over slots [C]. What ties goes by birth, never
by slot, so that the outcome does not depend on where an engram lies or how large the capacity is.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
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

SEARCH_ROWS = 16  # walks that take a step together


@flax.struct.dataclass
class Engrams:
    """Up to k engrams, the nearest first."""

    slots: Array  # i32 [k]; C where not valid
    serials: Array  # i32 [k]; -1 where not valid
    valid: Array  # bool [k]
    engrams: Array  # f32 [k, D]; 0 where not valid


@flax.struct.dataclass
class Reminded:
    """M^rem, and how its long-term part was found."""

    short_term: Engrams  # k = remind_short_term
    long_term: Engrams  # k = remind_long_term
    seeds: Array  # bool [C] M_ltm^init, where the search began
    found: Array  # bool [C] M_ltm^found, what it met

    @property
    def engrams(self) -> Array:
        """f32 [k_short + k_long, D], short-term first, as `weights` are."""
        return jnp.concatenate([self.short_term.engrams, self.long_term.engrams], -2)

    @property
    def valid(self) -> Array:
        """Bool [k_short + k_long]."""
        return jnp.concatenate([self.short_term.valid, self.long_term.valid], -1)


@functools.partial(jax.jit, static_argnames="config")
def remind(
    config: MemoriaConfig,
    state: State,
    working: Array,
    key: Key | None = None,
    active: Array | bool = True,
) -> tuple[State, Reminded]:
    """Puts new engrams into working memory and reminds those near them. Nothing has fired or aged yet.

    Args:
      working: [N_wm, D], M_wm. No gradient goes into what is stored. They replace working engrams that the state still
        holds, as if those had not been. Where some are NaN, the oldest are reminded; the rest of memory stays sound.
      key: decides ties where config.ties is 'random'; else it may be None.
      active: bool []; where false the state comes back bit for bit and nothing is reminded.

    Raises:
      ValueError: the state or `working` has another shape than the config's, or a key is missing.
    """
    check_state(config, state)
    if working.shape != (config.working, config.dim):
        raise ValueError(
            f"working has shape {working.shape}, expected [{config.working}, {config.dim}] (config.working, config.dim)"
        )
    check_active(active)
    if key is None and config.ties == "random":
        raise ValueError("config.ties='random' needs a key; or choose 'hash', 'oldest' or 'newest'")
    active = jnp.asarray(active, bool)
    working = jax.lax.stop_gradient(working.astype(jnp.float32))
    if config.checked:
        wrong = active & ~jnp.isfinite(working).all(-1)
        checkify.check(
            ~wrong.any(), "working: engram {i} holds a NaN or an infinity", i=wrong.argmax()
        )
    state = _numbered_anew(config, jax.lax.stop_gradient(state), active)
    state = _add_working(config, state, working, active)
    score = correlation(config, state, working)
    short_term = _nearest(
        state, score, (state.kind == SHORT_TERM) & active, config.remind_short_term
    )
    if config.remind_long_term:
        seeds, found = _search(config, state, short_term, key, active)
    else:
        seeds = found = jnp.zeros(config.capacity, bool)
    long_term = _nearest(state, score, found, config.remind_long_term)
    return state, Reminded(short_term, long_term, seeds, found)


def _numbered_anew(config: MemoriaConfig, state: State, active: Array) -> State:
    """Where the serials would pass 2^31, the living get new ones, from 0 on by birth.

    All that serials say stays: who is older, and who was born before whom last fired. Ties that are
    decided by a hash of serials are drawn anew.
    """
    slots = jnp.arange(config.capacity, dtype=jnp.int32)

    def full(carry: tuple[Array, Array, Array]) -> Array:
        return active & (carry[-1] > jnp.iinfo(jnp.int32).max - config.working)

    def anew(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        serial, fired, _ = carry
        alive = state.kind != EMPTY
        number = alive.sum(dtype=jnp.int32)
        rank = jnp.zeros_like(slots).at[state.by_birth].set(slots)
        rising = jnp.where(slots < number, serial[state.by_birth], jnp.iinfo(jnp.int32).max)
        fired = jnp.searchsorted(rising, fired).astype(jnp.int32)
        return jnp.where(alive, rank, -1), fired, -(-number // config.working) * config.working

    carry = (state.serial, state.fired, state.next_serial)
    if config.checked:  # as in `_walk`
        carry = jax.lax.cond(full(carry), anew, lambda carry: carry, carry)
    else:  # of several streams a loop computes nothing where none is full; a cond would
        carry = jax.lax.while_loop(full, anew, carry)
    return dataclasses.replace(
        state, **dict(zip(("serial", "fired", "next_serial"), carry, strict=True))
    )


def _add_working(config: MemoriaConfig, state: State, working: Array, active: Array) -> State:
    """Step 1, in place of working engrams that are still there."""
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
    """Step 2: how near each slot's engram is to the working memory, f32 [C], up to what is the same for all of them."""
    # With c the mean of the n working engrams, the mean over j of -|x - w_j|^2 is -|x - c|^2 up to a constant. It
    # comes from the difference: |x|^2 - 2 x c + |c|^2 loses what is small where all have something large in common.
    n = len(working)
    score = -((n * state.engrams - working.sum(0)) ** 2).sum(-1)
    if config.correlation == "exp":
        # The log of the sum over j of exp(-|x - w_j|^2), which itself is 0 in f32 for all but the nearest:
        # -|x - w|^2 = -|x - c|^2 + 2 (x - c) (w - c) - |w - c|^2.
        highest = jax.lax.Precision.HIGHEST  # accelerators' default would change who is reminded
        center = working.mean(0)
        spread = working - center
        products = (
            jnp.dot(spread, state.engrams.T, precision=highest)
            - jnp.dot(spread, center, precision=highest)[:, None]
        )
        score = score / n**2 + jax.nn.logsumexp(
            2.0 * products - (spread**2).sum(-1, keepdims=True), 0
        )
    return jnp.where(jnp.isnan(score), jnp.finfo(jnp.float32).min, score)


def _nearest(state: State, score: Array, among: Array, k: int) -> Engrams:
    """Steps 3 and 6: the k best of a mask [C]; ties: the oldest, since top_k prefers what comes first."""
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
    """Steps 4 and 5 -> seeds [C], found [C]."""
    long_term = (state.kind == LONG_TERM) & active
    if config.search_seeds == "full":
        return long_term, long_term
    capacity = config.capacity
    rank = (
        jnp.zeros(capacity, jnp.int32).at[state.by_birth].set(jnp.arange(capacity, dtype=jnp.int32))
    )
    salt = _salt(config, state, key)
    seeds = jnp.zeros(capacity, bool)
    if config.remind_short_term:
        prefer = None
        if config.ties in ("random", "hash"):
            prefer = jnp.maximum(_hash(salt, short_term.serials[:, None], state.serial), 1)
        elif config.ties == "newest":
            prefer = jnp.broadcast_to(
                rank.astype(jnp.uint32) + 1, (config.remind_short_term, capacity)
            )
        to, count = _strongest(state, rank, short_term.slots, long_term, prefer)
        go = short_term.valid & (count >= (0 if config.follow_zero_edges else 1))
        seeds = seeds.at[jnp.where(go, to, capacity)].set(True, mode="drop")
    if config.search_seeds == "all_short_term":
        seeds = _draw(config, state, short_term, long_term, salt, seeds)
    return seeds, _walk(config, state, seeds, long_term, rank)


def _salt(config: MemoriaConfig, state: State, key: Key | None) -> Array:
    """u32 [] what a step's hashes begin with: random bits, or the number of the step, counted from 1."""
    if config.ties == "random" and key is not None:
        return jax.random.bits(key, dtype=jnp.uint32)
    return (state.next_serial // config.working).astype(jnp.uint32)


def _hash(salt: Array, source: Array, candidate: Array) -> Array:
    """u32 of the broadcast shape, as good as drawn anew for each salt: one hash costs less than one random number."""
    source, candidate = source.astype(jnp.uint32), candidate.astype(jnp.uint32)
    h = (
        (candidate * jnp.uint32(0x9E3779B1))
        ^ (source * jnp.uint32(0x85EBCA77))
        ^ (salt * jnp.uint32(0xC2B2AE3D))
    )
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    return h ^ (h >> 12)


def _strongest(
    state: State, rank: Array, slots: Array, to: Array, prefer: Array | None = None
) -> tuple[Array, Array]:
    """Where the strongest edge of each of slots [R] leads, among slots `to` [C]: (slot [R], count [R], -1 for none).

    Edges of one engram are compared by their counts: what they are divided by is the same. Of equal ones the one with
    the highest `prefer` (u32 [R, C], from 1 up) is taken, without it the one to the oldest engram (lowest `rank` [C]).
    """
    capacity = len(rank)
    rows = counts_of(state, slots)
    if prefer is not None:
        rows = jnp.where(to, rows, -1)
        most = rows.max(-1)
        return jnp.where((rows == most[:, None]) & to, prefer, 0).argmax(-1), most
    bits = (capacity - 1).bit_length()
    older = capacity - 1 - rank
    if (
        jnp.iinfo(rows.dtype).bits - 1 + bits <= 31
    ):  # count and age in one number: one pass over the rows, not two
        best = jnp.where(to, (rows.astype(jnp.int32) << bits) | older, -1).max(-1)
        most, oldest = best >> bits, best & (2**bits - 1)
    else:
        rows = jnp.where(to, rows, -1)
        most = rows.max(-1)
        oldest = jnp.where((rows == most[:, None]) & to, older, -1).max(-1)
    return state.by_birth.at[capacity - 1 - oldest].get(mode="clip"), most


def _draw(
    config: MemoriaConfig,
    state: State,
    short_term: Engrams,
    long_term: Array,
    salt: Array,
    seeds: Array,
) -> Array:
    """Adds to seeds [C] one long-term engram for each short-term engram that is not reminded.

    That is what the package's "row of the last engram" comes to, all of whose counts are 0: any long-term engram will
    do, by the rule for ties.
    """
    capacity = config.capacity
    number = long_term.sum(
        dtype=jnp.int32
    )  # the first ones by birth; then come the short-term engrams
    places = number + jnp.arange(config.short_term_capacity, dtype=jnp.int32)
    sources = state.by_birth.at[places].get(mode="clip")
    reminded = jnp.zeros(capacity, bool).at[short_term.slots].set(True, mode="drop")
    draws = (state.kind[sources] == SHORT_TERM) & ~reminded[sources] & (places < capacity)
    if config.ties in ("random", "hash"):
        share = (_hash(salt, state.serial[sources], jnp.uint32(0)) >> 8).astype(
            jnp.float32
        ) / 2**24  # of [0, 1)
        drawn = jnp.minimum((share * number).astype(jnp.int32), number - 1)
    else:
        drawn = jnp.full(places.shape, 0 if config.ties == "oldest" else number - 1)
    to = jnp.where(draws & (number > 0), state.by_birth[drawn], capacity)
    return seeds.at[to].set(True, mode="drop")


def _walk(
    config: MemoriaConfig, state: State, seeds: Array, long_term: Array, rank: Array
) -> Array:
    """Step 5: all that walks from the seeds meet, [C].

    A walk goes along its strongest edge to what no walk has met at an earlier level; walks that meet are one from there
    on. So a level is a set, and the loop takes a few of it at a time.
    """
    capacity = config.capacity
    width = capacity if config.checked else min(SEARCH_ROWS, capacity)

    def more(carry):
        level, here, *_ = carry
        return (level < config.search_depth) & here.any()

    def go(carry):
        level, here, ahead, found = carry
        going, slots = jax.lax.top_k(here.astype(jnp.float32), width)
        to, count = _strongest(state, rank, slots, long_term & ~found)
        goes = (going > 0) & (count >= (0 if config.follow_zero_edges else 1))
        ahead = ahead.at[jnp.where(goes, to, capacity)].set(True, mode="drop")
        here = here.at[slots].set(False)
        done = ~here.any()
        return (
            level + done,
            jnp.where(done, ahead, here),
            ahead & ~done,
            jnp.where(done, found | ahead, found),
        )

    carry = (jnp.int32(0), seeds, jnp.zeros(capacity, bool), seeds)
    if (
        config.checked
    ):  # checkify has no rule for a while_loop of several streams; a level at a time needs none
        return jax.lax.fori_loop(0, config.search_depth, lambda _, carry: go(carry), carry)[-1]
    return jax.lax.while_loop(more, go, carry)[-1]
