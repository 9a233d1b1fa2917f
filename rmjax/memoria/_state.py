"""The state of one stream: its engrams, and how often they fired together.

It is a pytree whose shapes depend on the config alone. C is the capacity, D the width of an engram.
Slots are never moved: ageing changes `kind`, and death frees the slot. Nothing ever reads the rows
of `engrams` and `counts` that belong to a free slot.
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
HEAD_ROOM = 1.25  # default long-term capacity over the size at which Appendix E says it settles

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
    """Sizes and rules of a memory. It is hashable, so it can be a static argument.

    The defaults are those of the paper's language models. "The package" is the authors'
    memoria-pytorch; the values "released" and "all_short_term" do what it does.

    Attributes:
      working: N_wm, engrams born at each step.
      short_term_capacity: C_stm.
      remind_short_term: N_stm^rem, the most short-term engrams reminded at a step.
      remind_long_term: N_ltm^rem, the most long-term engrams reminded at a step.
      search_depth: N_depth.
      initial_lifespan: steps. With at most 1, an engram dies before it can be reminded.
      lifespan_extend: alpha, the steps that a reminded engram gains on average.
      dim: D, the width of an engram.
      long_term_capacity: long-term engrams at most. A full memory evicts the engram with the least
        lifespan. None: 1.25 times the size at which Appendix E says long-term memory settles, plus
        `working`, but at most max_segments x working.
      max_segments: length of the longest stream, in steps. None: it is not known.
      correlation: how near two engrams are. "exp": exp(-d^2) (section 3.2, package 1.0.0),
        computed as a logarithm. "negative_square": -d^2 (package 1.1.0).
      search_seeds: where the search starts. "reminded": at the strongest edge of each reminded
        short-term engram (section 3.2 step 4), so without such an engram the search meets nothing.
        "all_short_term": also at one long-term engram drawn for each short-term engram that is not
        reminded. "full": there is no search, and all long-term engrams count as met.
      ties: which of equally strong edges step 4 takes. "random": drawn from the key. "hash": by a
        hash of the step's number and both serials. "oldest" or "newest": the edge to that engram.
        Step 5 always takes the edge to the oldest engram.
      follow_zero_edges: follow an edge of weight 0 if an engram has no other.
      order: "paper": forget, then move (section 3.4). "released": move, then forget.
      lifespan_increment: what a reminded engram gains. "paper": Inc_i of section 3.4. "released":
        w_i R alpha; R is the number of reminded engrams, plus one if a short-term engram is not
        reminded. "given": its weight as it is.
      counts_dtype: "int8", "int16" or "int32". A count stops at the largest number of its type.
      checked: checks values too, which costs time. Call under jax.experimental.checkify.checkify.

    Raises:
      ValueError: a value is out of range. The message names the field and the range.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                choices = _CHOICES[field.name]
                fits, must = bool(value in choices), f"one of {', '.join(choices)}"
            elif field.type == "bool":
                fits, must = isinstance(value, bool), "True or False"
            elif field.type == "float":
                number = isinstance(value, int | float | np.floating)
                fits = number and not isinstance(value, bool) and bool(0 <= value < math.inf)
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
        """Capacity of long-term memory, in engrams."""
        if self.long_term_capacity is not None:
            return self.long_term_capacity
        # Appendix E counts what reminding adds. Engrams that outlive short-term memory without
        # being reminded come on top.
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
    """The memory of one stream; with several streams every field has a leading axis.

    A step is `remind`, then `memorize_and_forget`.
    """

    engrams: Array  # f32 [C, D]
    kind: Array  # i8 [C] 0 empty, 1 working, 2 short-term, 3 long-term
    lifespan: Array  # f32 [C] steps left; 0 where empty
    serial: Array  # i32 [C] order of birth; -1 where empty
    # Count_ij is counts[i, j] if i and j are alive and serial[j] < fired[i], otherwise 0.
    counts: Array  # i8, i16 or i32 [C, C]
    age: Array  # i32 [C] steps since birth; 0 where empty
    next_serial: Array  # i32 [] of the next engram; `remind` renumbers before it would pass 2^31
    evicted: Array  # i32 [] long-term engrams that a full long-term memory has evicted
    fired: Array  # i32 [C] next_serial when the engram last fired; 0: it never has
    by_birth: Array  # i32 [C] slots in order of birth, the oldest first; free slots come last


def init(config: MemoriaConfig) -> State:
    """Returns the empty memory of one stream; `fork(init(config), n)` is that of n streams.

    Args:
      config: sizes and rules.

    Returns:
      The state, whose shapes depend on the config alone.
    """
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
    """Empties some streams.

    The large arrays, engrams and counts, are not written: nothing refers to their old values.

    Args:
      state: of streams [...]; one stream has no axis.
      mask: bool [...], true for the streams to empty.

    Returns:
      The state; the other streams stay bit for bit.

    Raises:
      ValueError: `mask` does not have one value for each stream.
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
    """Returns the slots i32 [N_wm] of the working engrams, or the free slots for them.

    They come right after the short-term and long-term engrams in `by_birth`.
    """
    older = ((state.kind == SHORT_TERM) | (state.kind == LONG_TERM)).sum(dtype=jnp.int32)
    return jax.lax.dynamic_slice_in_dim(state.by_birth, older, config.working)


def counts_of(state: State, slots: Array) -> Array:
    """Returns rows [R, C] of the counts for slots [R].

    They are right between living engrams only. The row of a slot out of range may be anything.
    """
    rows = state.counts.at[slots].get(mode="clip")
    fired = state.fired.at[slots].get(mode="clip")
    return jnp.where(state.serial < fired[:, None], rows, 0)


def cofire_counts(state: State) -> Array:
    """Returns Count_ij (section 3.1): how often engrams i and j fired together.

    Args:
      state: of streams [...].

    Returns:
      i32 [..., C, C]; 0 where one of the slots is empty.
    """
    alive = state.kind != EMPTY
    known = (
        alive[..., :, None]
        & alive[..., None, :]
        & (state.serial[..., None, :] < state.fired[..., :, None])
    )
    return jnp.where(known, state.counts, 0).astype(jnp.int32)


def edge_weights(state: State) -> Array:
    """Returns E_ij = Count_ij / Count_ii (section 3.1): how often j fired when i did.

    Args:
      state: of streams [...].

    Returns:
      f32 [..., C, C]; 0 where i never fired.
    """
    counts = cofire_counts(state)
    fires = jnp.diagonal(counts, axis1=-2, axis2=-1)[..., :, None]
    return counts / jnp.maximum(fires, 1).astype(jnp.float32)


def fork(state: State, copies: int | None = None) -> State:
    """Copies a state into new buffers, so that either of the two may be donated.

    Args:
      state: of any number of streams.
      copies: number of copies, along a new leading axis. None: one copy, without a new axis.

    Returns:
      The copy or copies.
    """
    if copies is None:
        copy: State = jax.tree.map(jnp.copy, state)
        return copy
    many: State = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], copies, 0), state)
    return many


def check_state(config: MemoriaConfig, state: State) -> None:
    """Checks shapes and types of a state.

    Args:
      config: sizes and rules.
      state: should be that of one stream.

    Raises:
      ValueError: a field does not have the shape or type that the config asks for.
    """
    expected = jax.eval_shape(lambda: init(config))
    for field in dataclasses.fields(State):
        actual, wanted = getattr(state, field.name), getattr(expected, field.name)
        if actual.shape == wanted.shape and actual.dtype == wanted.dtype:
            continue
        cure = "make it with memoria.init(config)"
        if actual.ndim > wanted.ndim:
            cure = "for several streams use jax.vmap"
        raise ValueError(
            f"state.{field.name} is {actual.dtype}{list(actual.shape)}, but this config's is "
            f"{wanted.dtype}{list(wanted.shape)} (capacity {config.capacity}, dim {config.dim}): "
            f"{cure}"
        )


def check_active(active: Array | bool) -> None:
    """Checks that `active` is one bool.

    Raises:
      ValueError: it has axes.
    """
    if jnp.shape(active):
        raise ValueError(
            f"active has shape {jnp.shape(active)}, expected one bool: for several streams use "
            "jax.vmap"
        )
