"""The engrams of one stream and how often they fired together: a pytree whose shapes depend on the config alone.

C is the capacity, D the width of an engram. Slots are never moved: ageing relabels `kind`, death frees the slot. What a
free slot's row of `engrams`, `square_norm` and `counts` holds is never looked at.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp

from rmjax import checkpoint
from rmjax.types import Array

EMPTY, WORKING, SHORT_TERM, LONG_TERM = range(4)  # State.kind
VERSION = 1  # of saved states
HEAD_ROOM = 1.25  # of the default long-term capacity over the size that Appendix E says it settles at

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

    "released": as the authors' package, memoria-pytorch 1.0.0 and 1.1.0, does it, where the paper says otherwise.

    Raises:
      ValueError: a value cannot be; says which and what it may be.
    """

    working: int = 50  # N_wm, engrams born each step
    short_term_capacity: int = 400
    remind_short_term: int = 50  # N_stm^rem
    remind_long_term: int = 50  # N_ltm^rem
    search_depth: int = 10  # N_depth
    initial_lifespan: float = 9.0  # steps
    lifespan_extend: float = 8.0  # alpha
    dim: int = 768  # D
    # Where it is full, the engram with the least lifespan is evicted. None: 1.25 times what Appendix E says it settles
    # at, and `working` more; at most max_segments x working.
    long_term_capacity: int | None = None
    max_segments: int | None = None  # the longest stream, in steps, where there is one
    # How near two engrams are: exp(-d^2) (section 3.2, package 1.0.0), in the log domain; or -d^2 (package 1.1.0).
    correlation: str = "exp"
    # Where the search starts: at the strongest edge of each reminded short-term engram (section 3.2 step 4); there and
    # at one long-term engram drawn for each short-term engram that is not reminded (what the package does); or no
    # search, all of long-term memory is found (the authors' ablation).
    search_seeds: str = "reminded"
    # Which of equally strong edges that first step takes: drawn from the key; by a hash of (step, serials of both); or
    # to the oldest or newest engram. The search itself always takes the oldest.
    ties: str = "random"
    follow_zero_edges: bool = True  # from an engram that never fired with what is left, go on to any (the oldest)
    order: str = "paper"  # forget, then move (section 3.4), or move, then forget (the package)
    # What a reminded engram gains: Inc_i of section 3.4; the package's w_i R alpha; or `weights` as they are.
    lifespan_increment: str = "paper"
    counts_dtype: str = "int16"  # a count stops at the largest number it holds
    checked: bool = False  # checks values too; call under jax.experimental.checkify.checkify

    def __post_init__(self):
        least = {"working": 1, "dim": 1, "max_segments": 1}
        for name in ("working", "dim", "short_term_capacity", "remind_short_term", "remind_long_term", "search_depth"):
            self._check_whole(name, least.get(name, 0))
        for name in ("long_term_capacity", "max_segments"):
            if getattr(self, name) is not None:
                self._check_whole(name, least.get(name, 0))
        for name in ("initial_lifespan", "lifespan_extend"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"MemoriaConfig.{name}={value!r}: must be a number, at least 0")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"MemoriaConfig.{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"MemoriaConfig.{name}={value!r}: must be a whole number, at least {least}")

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
    counts: Array  # i16 [C, C] times i and j fired together, where serial[j] < fired[i]; 0 elsewhere, whatever it holds
    age: Array  # i32 [C] steps since birth, 0 where empty
    next_serial: Array  # i32 [] serial of the next engram
    evicted: Array  # i32 [] long-term engrams that went because their capacity was full
    fired: Array  # i32 [C] next_serial as it was when the engram last fired; 0: it has not
    order: Array  # i32 [C] slots by birth, the oldest engram first; after the engrams the empty slots
    square_norm: Array  # f32 [C] |engram|^2


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
        order=jnp.arange(c, dtype=jnp.int32),
        square_norm=jnp.zeros(c, jnp.float32),
    )


def reset(state: State, mask: Array) -> State:
    """Empties the streams of a state [B, ...] where `mask` [B] is true (one stream: mask []); others stay bit for bit.

    What is large, engrams and counts, is left where it lies: nothing refers to it any more.
    """
    mask = jnp.asarray(mask, bool)
    if mask.shape != state.evicted.shape:
        raise ValueError(f"reset: mask has shape {mask.shape}, but the state has streams {state.evicted.shape}")
    slots = jnp.arange(state.kind.shape[-1], dtype=jnp.int32)
    empty = {"serial": -1, "order": slots}
    names = ("kind", "lifespan", "serial", "age", "next_serial", "evicted", "fired", "order")

    def where(name: str) -> Array:
        value = getattr(state, name)
        wide = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
        return jnp.where(wide, jnp.asarray(empty.get(name, 0), value.dtype), value)

    return dataclasses.replace(state, **{name: where(name) for name in names})


def cofire_counts(state: State) -> Array:
    """How often engrams i and j fired together, i32 [..., C, C]; 0 where a slot is empty (Count_ij of section 3.1)."""
    alive = state.kind != EMPTY
    known = alive[..., :, None] & alive[..., None, :] & (state.serial[..., None, :] < state.fired[..., :, None])
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


def save(config: MemoriaConfig, state: State, path: str | Path) -> None:
    """Writes a state, of any number of streams, and its config as the directory `path`; what was there is replaced.

    Whole or not at all, by Orbax, every file under a digest.
    """
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[state.evicted.ndim :], x.dtype), state)
    check_state(config, one)
    about = {"memoria": {"version": VERSION, "config": dataclasses.asdict(config)}}
    checkpoint.save_tree(path, state, about)


def load(config: MemoriaConfig, path: str | Path) -> State:
    """The state that `save` wrote under the same config (`checked` may differ).

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is damaged, of another version, or was saved under another config: names the fields that differ.
    """

    def like(manifest: dict) -> State:
        about = manifest.get("memoria")
        if about is None or about["version"] != VERSION:
            found = "no Memoria state" if about is None else f"of version {about['version']}"
            raise ValueError(f"{path} is {found}; this code reads Memoria states of version {VERSION}")
        saved, wanted = about["config"], dataclasses.asdict(config)
        names = [name for name in {**wanted, **saved} if name != "checked" and saved.get(name) != wanted.get(name)]
        if names:
            differ = "; ".join(f"{name}: saved {saved.get(name)!r}, asked {wanted.get(name)!r}" for name in names)
            raise ValueError(f"{path} was saved under another config: {differ}")
        streams = tuple(manifest["leaves"]["evicted"][1])
        one = jax.eval_shape(lambda: init(config))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(streams + x.shape, x.dtype), one)

    return jax.tree.map(jnp.asarray, checkpoint.load_tree(path, like))


def check_state(config: MemoriaConfig, state: State) -> None:
    """Raises ValueError where a state is not one stream's of this config."""
    expected = jax.eval_shape(lambda: init(config))
    for field in dataclasses.fields(State):
        found, wanted = getattr(state, field.name), getattr(expected, field.name)
        if found.shape == wanted.shape and found.dtype == wanted.dtype:
            continue
        cure = "for several streams use jax.vmap" if found.ndim > wanted.ndim else "make it with memoria.init(config)"
        raise ValueError(
            f"state.{field.name} is {found.dtype}{list(found.shape)}, but this config's is "
            f"{wanted.dtype}{list(wanted.shape)} (capacity {config.capacity}, dim {config.dim}): {cure}"
        )
