"""Recorded runs of a memory: the steps run in a scan, which compiles once for each config."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmjax import memoria
from rmjax.memoria import MemoriaConfig, Reminded, State

SMALL = {
    "working": 3,
    "short_term_capacity": 6,
    "remind_short_term": 2,
    "remind_long_term": 3,
    "search_depth": 2,
    "initial_lifespan": 4.0,
    "lifespan_extend": 2.0,
    "dim": 2,
    "ties": "hash",
}


def small(**changes) -> MemoriaConfig:
    return MemoriaConfig(**(SMALL | changes))


class Steps(NamedTuple):
    """The results of T steps; every field is stacked, as NumPy arrays."""

    reminding: State  # as `remind` returned it
    reminded: Reminded
    after: State  # as `memorize_and_forget` returned it


def given(reminded: Reminded, x: dict) -> jax.Array:
    """Returns the weights [k] as they come."""
    return x["weights"]


def by_serial(reminded: Reminded, x: dict) -> jax.Array:
    """Looks up the weights [k] in a table of serials and weights."""
    serials = jnp.concatenate([reminded.short_term.serials, reminded.long_term.serials])
    return jnp.where(serials[:, None] == x["serials"], x["weights"], 0.0).sum(-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(config, weigh, state, xs):
    def step(state, x):
        reminding, reminded = memoria.remind(config, state, x["working"], x["key"], x["active"])
        state = memoria.memorize_and_forget(
            config, reminding, reminded, weigh(reminded, x), x["active"]
        )
        return state, Steps(reminding, reminded, state)

    return jax.lax.scan(step, state, xs)


def stream(
    config: MemoriaConfig, steps: int, seed: int = 0, grid: float | None = 0.5
) -> dict[str, np.ndarray]:
    """Returns random inputs of `steps` steps.

    Coordinates are multiples of `grid`, so distances are exact and often tie.
    """
    rng = np.random.default_rng(seed)
    working = rng.normal(size=(steps, config.working, config.dim))
    if grid:
        working = np.round(working / grid) * grid
    k = config.remind_short_term + config.remind_long_term
    return {
        "working": working.astype(np.float32),
        "weights": (rng.integers(0, 8, (steps, k)) / 8).astype(np.float32),
        "key": jax.random.split(jax.random.key(seed), steps),
        "active": np.ones(steps, bool),
    }


def run(config: MemoriaConfig, xs: dict, state: State | None = None, weigh=given) -> Steps:
    """Runs the steps of one stream, from an empty memory or from `state`."""
    state = memoria.init(config) if state is None else state
    return jax.tree.map(np.asarray, _scan(config, weigh, state, xs)[1])


def alive(state: State) -> np.ndarray:
    """Returns the slots of the living engrams of one state, by birth."""
    slots = np.argsort(state.serial, kind="stable")
    return slots[np.asarray(state.serial)[slots] >= 0]


def at(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


def serials(engrams: memoria.Engrams) -> list[int]:
    return engrams.serials[engrams.valid].tolist()
