"""The engrams of one stream and how often they fired together: a pytree whose shapes depend on the config alone.

C is the capacity, D the width of an engram. Slots are never moved: ageing relabels `kind`, death frees the slot. What a
free slot's row of `engrams` and `counts` holds is never looked at.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rmjax.types import Array

EMPTY, WORKING, SHORT_TERM, LONG_TERM = range(4)  # State.kind
HEAD_ROOM = (
    1.25  # of the default long-term capacity over the size that Appendix E says it settles at
)

_CHOICES = {
    "correlation": ("exp", "negative_square"),
    "search_seeds": ("reminded", "all_short_term", "full"),
    "ties": ("random", "hash", "oldest", "newest"),
    "order": ("paper", "released"),
    "lifespan_increment": ("paper", "released", "given"),
    "counts_dtype": ("int8", "int16", "int32"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoriaConfig:
    """Sizes and rules; hashable, so that it can be a static argument. The defaults are the paper's language models.

    "The package" is the authors' memoria-pytorch; the values "released" and "all_short_term" are what it does.

    Attributes:
      working: N_wm, engrams born each step.
      short_term_capacity: C_stm.
      remind_short_term, remind_long_term: N_stm^rem and N_ltm^rem, how many are reminded at most.
      search_depth: N_depth.
      initial_lifespan: steps. At most 1: an engram dies before it can be reminded.
      lifespan_extend: alpha, steps that a reminded engram gains on average.
      dim: D, the width of an engram.
      long_term_capacity: where it is full, the engram with the least lifespan is evicted. None: 1.25 times what
        Appendix E says long-term memory settles at, and `working` more; at most max_segments x working.
      max_segments: the longest stream, in steps, where there is one.
      correlation: how near two engrams are: "exp", exp(-d^2) (section 3.2, package 1.0.0), in the log domain; or
        "negative_square", -d^2 (package 1.1.0).
      search_seeds: where the search starts. "reminded": at the strongest edge of each reminded short-term engram
        (section 3.2 step 4), so that without those nothing is found. "all_short_term": there, and at one long-term
        engram drawn for each short-term engram that is not reminded. "full": no search, all of it is found.
      ties: which of equally strong edges that first step takes: "random", drawn from the key; "hash" of the number of
        the step and both serials; to the "oldest" or "newest" engram. The search itself always goes on to the oldest.
      follow_zero_edges: from an engram that never fired with any that is left, go on all the same.
      order: "paper": forget, then move (section 3.4); "released": move, then forget.
      lifespan_increment: what a reminded engram gains: "paper", Inc_i of section 3.4; "released", w_i R alpha, where R
        is one more than are reminded if a short-term engram is not; "given", its weight as it is.
      counts_dtype: "int8", "int16" or "int32"; a count stops at the largest number it holds.
      checked: checks values too, at a price; call under jax.experimental.checkify.checkify.

    Raises:
      ValueError: a value cannot be; says which and what it may be.
    """

    working: int = 50
    short_term_capacity: int = 400
    remind_short_term: int = 50
    remind_long_term: int = 50
    search_depth: int = 10
    initial_lifespan: float = 9.0
    lifespan_extend: float = 8.0
    dim: int = 768
    long_term_capacity: int | None = None
    max_segments: int | None = None
    correlation: str = "exp"
    search_seeds: str = "reminded"
    ties: str = "random"
    follow_zero_edges: bool = True
    order: str = "paper"
    lifespan_increment: str = "paper"
    counts_dtype: str = "int16"
    checked: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                fits, must = (
                    bool(value in _CHOICES[field.name]),
                    f"one of {', '.join(_CHOICES[field.name])}",
                )
            elif field.type == "bool":
                fits, must = isinstance(value, bool), "True or False"
            elif field.type == "float":
                number = isinstance(value, int | float | np.floating) and not isinstance(
                    value, bool
                )
                fits = number and bool(0 <= value < math.inf)
                must = "a number, at least 0"
            else:
                least = 1 if field.name in ("working", "dim", "max_segments") else 0
                number = isinstance(value, int | np.integer) and not isinstance(value, bool)
                fits = number and bool(value >= least)
                fits |= value is None and field.type.endswith("None")
                must = f"a whole number, at least {least}"
            if not fits:
                raise ValueError(f"MemoriaConfig.{field.name}={value!r}: must be {must}")
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())

    @property
    def long_term(self) -> int:
        """Capacity of long-term memory."""
        if self.long_term_capacity is not None:
            return self.long_term_capacity
        # Appendix E counts what reminding adds; an engram that outlives short-term memory unreminded stays besides.
        unreminded = self.initial_lifespan - 1 - self.short_term_capacity / self.working
        settled = self.lifespan_extend * (self.remind_short_term + self.remind_long_term)
        settled += self.working * max(0.0, unreminded)
        most = math.ceil(HEAD_ROOM * settled) + self.working
        return most if self.max_segments is None else min(most, self.max_segments * self.working)

    @property
    def capacity(self) -> int:
        """C, the slots of a state."""
        return self.working + self.short_term_capacity + self.long_term


@flax.struct.dataclass
class State:
    """One stream's memory; with more streams every field has a leading axis. A step is remind, then memorize."""

    engrams: Array  # f32 [C, D]
    kind: Array  # i8 [C] 0 empty, 1 working, 2 short-term, 3 long-term
    lifespan: Array  # f32 [C] steps left; 0 where empty
    serial: Array  # i32 [C] order of birth, -1 where empty
    counts: Array  # i16 [C, C] times that i and j, both alive, fired together, if serial[j] < fired[i]; else that is 0
    age: Array  # i32 [C] steps since birth, 0 where empty
    next_serial: Array  # i32 [] serial of the next engram; before it would pass 2^31, `remind` numbers all anew
    evicted: Array  # i32 [] long-term engrams that went because their capacity was full
    fired: Array  # i32 [C] next_serial as it was when the engram last fired; 0: it has not
    by_birth: (
        Array  # i32 [C] slots, that of the oldest engram first; after the engrams the empty ones
    )


def init(config: MemoriaConfig) -> State:
    """The empty memory of one stream. For more: `fork(init(config), streams)`."""
    c = config.capacity
    return State(
        engrams=jnp.zeros((c, config.dim), jnp.float32),
        kind=jnp.zeros(c, jnp.int8),
        lifespan=jnp.zeros(c, jnp.float32),
        serial=jnp.full(c, -1, jnp.int32),
        counts=jnp.zeros((c, c), config.counts_dtype),
        age=jnp.zeros(c, jnp.int32),
        next_serial=jnp.zeros((), jnp.int32),
        evicted=jnp.zeros((), jnp.int32),
        fired=jnp.zeros(c, jnp.int32),
        by_birth=jnp.arange(c, dtype=jnp.int32),
    )


def reset(state: State, mask: Array) -> State:
    """Empties the streams of a state [B, ...] where `mask` [B] is true (one stream: mask []); others stay bit for bit.

    What is large, engrams and counts, is left where it lies: nothing refers to it any more.
    """
    mask = jnp.asarray(mask, bool)
    if mask.shape != state.evicted.shape:
        raise ValueError(
            f"reset: mask has shape {mask.shape}, but the state has streams {state.evicted.shape}"
        )
    slots = jnp.arange(state.kind.shape[-1], dtype=jnp.int32)
    empty = {"serial": -1, "by_birth": slots}
    names = ("kind", "lifespan", "serial", "age", "next_serial", "evicted", "fired", "by_birth")

    def where(name: str) -> Array:
        value = getattr(state, name)
        wide = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
        return jnp.where(wide, jnp.asarray(empty.get(name, 0), value.dtype), value)

    return dataclasses.replace(state, **{name: where(name) for name in names})


def working_slots(config: MemoriaConfig, state: State) -> Array:
    """Slots [N_wm] behind the short-term and long-term engrams, by birth: of the working engrams, or free for them."""
    older = ((state.kind == SHORT_TERM) | (state.kind == LONG_TERM)).sum(dtype=jnp.int32)
    return jax.lax.dynamic_slice_in_dim(state.by_birth, older, config.working)


def counts_of(state: State, slots: Array) -> Array:
    """Rows [R, C] of the counts for slots [R], right between the living; for slots beyond C they are anything."""
    rows = state.counts.at[slots].get(mode="clip")
    fired = state.fired.at[slots].get(mode="clip")
    return jnp.where(state.serial < fired[:, None], rows, 0)


def cofire_counts(state: State) -> Array:
    """How often engrams i and j fired together, i32 [..., C, C]; 0 where a slot is empty (Count_ij of section 3.1)."""
    alive = state.kind != EMPTY
    known = (
        alive[..., :, None]
        & alive[..., None, :]
        & (state.serial[..., None, :] < state.fired[..., :, None])
    )
    return jnp.where(known, state.counts, 0).astype(jnp.int32)


def edge_weights(state: State) -> Array:
    """E_ij = Count_ij / Count_ii, f32 [..., C, C]: how often j fired when i did (section 3.1); 0 if i never fired."""
    counts = cofire_counts(state)
    fires = jnp.diagonal(counts, axis1=-2, axis2=-1)[..., :, None]
    return counts / jnp.maximum(fires, 1).astype(jnp.float32)


def fork(state: State, copies: int | None = None) -> State:
    """A copy with buffers of its own, so that either may be donated; `copies` of it along a new leading axis."""
    if copies is None:
        return jax.tree.map(jnp.copy, state)
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], copies, 0), state)


def check_state(config: MemoriaConfig, state: State) -> None:
    """Raises ValueError where a state is not one stream's of this config."""
    expected = jax.eval_shape(lambda: init(config))
    for field in dataclasses.fields(State):
        found, wanted = getattr(state, field.name), getattr(expected, field.name)
        if found.shape == wanted.shape and found.dtype == wanted.dtype:
            continue
        cure = (
            "for several streams use jax.vmap"
            if found.ndim > wanted.ndim
            else "make it with memoria.init(config)"
        )
        raise ValueError(
            f"state.{field.name} is {found.dtype}{list(found.shape)}, but this config's is "
            f"{wanted.dtype}{list(wanted.shape)} (capacity {config.capacity}, dim {config.dim}): {cure}"
        )


def check_active(active: Array | bool) -> None:
    """Raises ValueError where `active` is not of one stream."""
    if jnp.shape(active):
        raise ValueError(
            f"active has shape {jnp.shape(active)}, expected one bool: for several streams use jax.vmap"
        )
