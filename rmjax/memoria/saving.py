"""States of Memoria in files; apart from the rest, since Orbax writes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.io import checkpoint
from rmjax.memoria._state import EMPTY, LONG_TERM, MemoriaConfig, State, check_state, init

VERSION = 1  # of saved states
DEFAULTS = dataclasses.asdict(MemoriaConfig())  # for saved states that do not know a field yet


def save(config: MemoriaConfig, state: State, path: str | Path) -> None:
    """Writes a state, of any number of streams, and its config as the directory `path`; what was there is replaced.

    Whole or not at all, by Orbax, every file under a digest.

    Raises:
      ValueError: the state is not of this config; or the path is an address, or has a character
        that checkpoints cannot have.
      FileExistsError: something is there that `save` did not write.
      OSError: the disk is full; names the directory, its size and what to do.
    """
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[state.evicted.ndim :], x.dtype), state
    )
    check_state(config, one)
    about = {"memoria": {"version": VERSION, "config": dataclasses.asdict(config)}}
    checkpoint.save_tree(path, state, about)


def load(config: MemoriaConfig, path: str | Path) -> State:
    """The state that `save` wrote under the same config (`checked` may differ).

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is damaged, of another version, or was saved under another config: names the fields that differ.
        Or a leaf cannot be a memory's.
    """

    def like(manifest: dict) -> State:
        about = manifest.get("memoria")
        if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
            raise ValueError(f"{path} is no Memoria state")
        if about.get("version") != VERSION:
            actual = about.get("version")
            raise ValueError(
                f"{path} is of version {actual}; this code reads Memoria states of version {VERSION}"
            )
        saved, wanted = {**DEFAULTS, **about["config"]}, dataclasses.asdict(config)
        names = [name for name in saved if name != "checked" and saved[name] != wanted.get(name)]
        if names:
            differ = "; ".join(
                f"{name}: saved {saved.get(name)!r}, asked {wanted.get(name)!r}" for name in names
            )
            raise ValueError(f"{path} was saved under another config: {differ}")
        streams = tuple(manifest["leaves"].get("evicted", ["", []])[1])
        one = jax.eval_shape(lambda: init(config))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(streams + x.shape, x.dtype), one)

    state = checkpoint.load_tree(path, like)
    wrong = _unsound(state)
    if wrong:
        raise ValueError(f"{path} is no sound memory: {wrong}: bring it back from a copy")
    return jax.tree.map(jnp.asarray, state)


def _unsound(state: State) -> str | None:
    """What no memory can hold, of a state of any number of streams in NumPy arrays; None where all
    is sound.
    """
    slots = np.arange(state.kind.shape[-1])
    by_birth = lambda x: np.take_along_axis(x, np.asarray(state.by_birth), -1)
    if (np.sort(state.by_birth, -1) != slots).any():
        return "by_birth is no order of its slots"
    if ((state.kind < EMPTY) | (state.kind > LONG_TERM)).any():
        return f"kind must lie in {EMPTY} .. {LONG_TERM}"
    if (state.next_serial < 0).any():
        return "next_serial is below 0"
    alive = by_birth(state.kind != EMPTY)
    serial = np.where(alive, by_birth(state.serial), state.next_serial[..., None] + slots)
    if (alive != (by_birth(state.serial) >= 0)).any() or (alive[..., 1:] > alive[..., :-1]).any():
        return "serial must be -1 where a slot is empty, and by_birth has those last"
    if (serial[..., 1:] <= serial[..., :-1]).any():
        return "serial must rise by birth, up to next_serial"
    if np.isnan(state.lifespan).any():
        return "lifespan holds nan"
    low = [
        name for name in ("counts", "age", "evicted", "fired") if (getattr(state, name) < 0).any()
    ]
    return f"{low[0]} is below 0" if low else None
