"""Saves and loads Memoria states. A module of its own, since it needs Orbax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.io import checkpoint
from rmjax.memoria._state import EMPTY, LONG_TERM, MemoriaConfig, State, check_state, init

VERSION = 1  # of saved states
DEFAULTS = dataclasses.asdict(MemoriaConfig())  # for states saved before a field existed


def save(config: MemoriaConfig, state: State, path: str | Path) -> None:
    """Writes a state and its config as the directory `path`.

    Orbax writes the directory completely or not at all, with a digest of every file. An older saved
    state at this path is replaced.

    Args:
      config: of the state.
      state: of any number of streams.
      path: the directory.

    Raises:
      ValueError: the state is not of this config; or the path is an address, or has a character
        that checkpoints cannot have.
      FileExistsError: the path exists, and `save` did not write it.
      OSError: the disk is full. The message names the directory, its size and the cure.
    """
    axes = state.evicted.ndim
    check_state(config, jax.tree.map(lambda x: _struct(x.shape[axes:], x.dtype), state))
    about = {"memoria": {"version": VERSION, "config": dataclasses.asdict(config)}}
    checkpoint.save_tree(path, state, about)


def load(config: MemoriaConfig, path: str | Path) -> State:
    """Reads a state that `save` wrote.

    Args:
      config: as it was at `save`; only `checked` may differ.
      path: the directory.

    Returns:
      The state, of as many streams as were saved.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: the directory is damaged, of another version, or of another config (the message
        names the fields that differ); or its values cannot be those of a memory.
    """

    def expected(manifest: dict[str, Any]) -> State:
        return _expected(config, path, manifest)

    state = checkpoint.load_tree(path, expected)
    wrong = _unsound(state)
    if wrong:
        raise ValueError(f"{path} is no sound memory: {wrong}: restore it from a copy")
    loaded: State = jax.tree.map(jnp.asarray, state)
    return loaded


def _expected(config: MemoriaConfig, path: str | Path, manifest: dict[str, Any]) -> State:
    """Returns the shapes of a saved state; raises ValueError where it is not of this config."""
    about = manifest.get("memoria")
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise ValueError(f"{path} is no Memoria state: give a directory that memoria.save wrote")
    if about.get("version") != VERSION:
        version = about.get("version")
        raise ValueError(
            f"{path} is of version {version}; this code reads Memoria states of version {VERSION}"
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
    shapes: State = jax.tree.map(lambda x: _struct(streams + x.shape, x.dtype), one)
    return shapes


def _struct(shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _by_birth(state: State, x: np.ndarray) -> np.ndarray:
    """Sorts the slots [..., C] of an array by birth."""
    return np.take_along_axis(x, np.asarray(state.by_birth), -1)


def _unsound(state: State) -> str | None:
    """Names the first fault of a state; None: it has no fault.

    The state has NumPy arrays and any number of streams.
    """
    slots = np.arange(state.kind.shape[-1])
    if (np.sort(state.by_birth, -1) != slots).any():
        return "by_birth is no order of its slots"
    if ((state.kind < EMPTY) | (state.kind > LONG_TERM)).any():
        return f"kind must lie in {EMPTY} .. {LONG_TERM}"
    if (state.next_serial < 0).any():
        return "next_serial is below 0"
    alive = _by_birth(state, np.asarray(state.kind != EMPTY))
    serial = _by_birth(state, np.asarray(state.serial))
    if (alive != (serial >= 0)).any() or (alive[..., 1:] > alive[..., :-1]).any():
        return "serial must be -1 where a slot is empty, and by_birth must have those slots last"
    rising = np.where(alive, serial, np.asarray(state.next_serial)[..., None] + slots)
    if (rising[..., 1:] <= rising[..., :-1]).any():
        return "serial must rise by birth, up to next_serial"
    if np.isnan(state.lifespan).any():
        return "lifespan holds nan"
    names = ("counts", "age", "evicted", "fired")
    negative = [name for name in names if (getattr(state, name) < 0).any()]
    return f"{negative[0]} is below 0" if negative else None
