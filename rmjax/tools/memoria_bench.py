"""Measures the cost of a Memoria step for the rows of configs/memoria_bench.py."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from rmjax import memoria
from rmjax.io import cost
from rmjax.memoria._state import MemoriaConfig, State
from rmjax.run import environment
from rmjax.types import Array, Key

VARIANTS = {  # {variant: (correlation, search_seeds)}
    "reminded": ("negative_square", "reminded"),
    "all_short_term": ("negative_square", "all_short_term"),
    "exp, reminded": ("exp", "reminded"),
    "exp, all_short_term": ("exp", "all_short_term"),
}
RELEASED = ("negative_square", "all_short_term")  # what Memoria's released package does
TOPICS = 12
# Fields of MemoriaConfig that a row may set. The variants set the correlation and the seeds.
FIELDS = [
    field.name
    for field in dataclasses.fields(MemoriaConfig)
    if field.name not in ("correlation", "search_seeds")
]
# Pattern of the config keys of a card.
KEYS = rf"memoria\.\w+\.({'|'.join(['batch', 'steps', 'first', *FIELDS])})"


Measures = dict[str, Any]  # {name: number}, or nested


def measure_rows(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Measures]]:
    """Measures every row in every variant, each in a fresh process with its own memory peak.

    Args:
      rows: {name: row}. A row has batch, steps and first, see `measure`; released_ms, the
        milliseconds a step of Memoria's released package (0 or absent: not known); and `FIELDS`.

    Returns:
      {row: {variant: the dict of `measure`}}; the variant that does what the released package does
      also has times_as_fast_as_released.

    Raises:
      ValueError: a row lacks a key, has an unknown key, or has an impossible value; names the key.
    """
    result: dict[str, dict[str, Measures]] = {name: {} for name in rows}
    settings = {name: _split(name, row) for name, row in rows.items()}
    for name, (config, run, released) in settings.items():
        for variant, (correlation, search_seeds) in VARIANTS.items():
            chosen = dataclasses.replace(config, correlation=correlation, search_seeds=search_seeds)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                measured = pool.submit(measure, chosen, *run).result()
            if released and (correlation, search_seeds) == RELEASED:
                measured["times_as_fast_as_released"] = released / measured["step_ms"]
            result[name][variant] = measured
    return result


def _split(name: str, row: Mapping[str, Any]) -> tuple[MemoriaConfig, tuple[int, int, int], float]:
    """Splits a row into the config, (batch, steps, first) and released_ms; ValueError if wrong."""
    row = dict(row)
    try:
        run = row.pop("batch"), row.pop("steps"), row.pop("first")
    except KeyError as error:
        raise ValueError(f"config.memoria.{name}: {error.args[0]} is missing") from None
    released = row.pop("released_ms", 0.0)
    unknown = sorted(row.keys() - set(FIELDS))
    if unknown:
        raise ValueError(
            f"config.memoria.{name}.{unknown[0]}: no such key; there are {', '.join(FIELDS)}"
        )
    batch, steps, first = run
    if batch < 1 or not 0 <= first < steps:
        raise ValueError(
            f"config.memoria.{name}: needs batch >= 1 and 0 <= first < steps, got {run}"
        )
    return MemoriaConfig(**row), run, released


def measure(config: MemoriaConfig, batch: int, steps: int, first: int) -> Measures:
    """Runs steps of Memoria on random engrams, and times the later ones.

    Args:
      config: of Memoria.
      batch: number of streams.
      steps: number of steps.
      first: first step that counts.

    Returns:
      step_ms: median milliseconds; step_ms_fastest; state_bytes_per_stream; capacity: slots;
      process_peak_gb: peak memory of this process in 10^9 bytes; device_peak_gb: that of the
      device, if known; last_step: counts of engrams in the last step; device: its name.
    """
    # This process inherits the variable, if the parent was prepared. Only the JAX flag is missing.
    if "GLIBC_TUNABLES" in os.environ:
        environment.prepare()
    state = jax.jit(lambda: memoria.fork(memoria.init(config), batch))()
    state_bytes = cost.tree_bytes(state)
    topics = jax.random.normal(jax.random.key(0), (batch, TOPICS, config.dim))
    new = jax.jit(functools.partial(working_engrams, config))
    step = jax.jit(functools.partial(_step, config), donate_argnums=0)
    times = []
    for t in range(steps):
        topics, working, keys = jax.block_until_ready(new(topics, t))
        begin = time.perf_counter()
        state, seen = jax.block_until_ready(step(state, working, keys))
        times.append(1e3 * (time.perf_counter() - begin))
    result = {
        "step_ms": statistics.median(times[first:]),
        "step_ms_fastest": min(times[first:]),
        "process_peak_gb": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9,
        "state_bytes_per_stream": state_bytes // batch,
        "capacity": config.capacity,
        "last_step": {name: float(value) for name, value in seen.items()},
        "device": jax.devices()[0].device_kind,
    }
    on_device = jax.devices()[0].memory_stats()
    if on_device:
        result["device_peak_gb"] = on_device["peak_bytes_in_use"] / 1e9
    return result


def _step(
    config: MemoriaConfig, state: State, working: Array, keys: Key
) -> tuple[State, dict[str, Array]]:
    state, reminded = jax.vmap(functools.partial(memoria.remind, config))(state, working, keys)
    weights = jnp.ones(reminded.valid.shape)
    state = jax.vmap(functools.partial(memoria.memorize_and_forget, config))(
        state, reminded, weights
    )
    seen = {
        "found": reminded.found,
        "reminded": reminded.valid,
        "long_term": state.kind == memoria.LONG_TERM,
    }
    means = {name: value.sum(-1).mean() for name, value in seen.items()}
    return state, means | {"evicted": state.evicted.sum()}


def working_engrams(config: MemoriaConfig, topics: Array, t: Array) -> tuple[Array, Array, Key]:
    """Draws the engrams of a step near three topics; every 5 steps, one of the three changes.

    Args:
      config: of Memoria.
      topics: f32 [B, TOPICS, D].
      t: i32 [], the step.

    Returns:
      The topics after a small random drift, f32 [B, TOPICS, D]; new engrams f32 [B, N_wm, D], N_wm
      being `config.working`; and keys [B].
    """
    batch = len(topics)
    drift, which, noise, ties = jax.random.split(jax.random.fold_in(jax.random.key(1), t), 4)
    topics = topics + 0.05 * jax.random.normal(drift, topics.shape)
    chosen = (jax.random.randint(which, (batch, config.working), 0, 3) + t // 5) % TOPICS
    engrams = jnp.take_along_axis(topics, chosen[..., None], 1)
    engrams = 0.3 * (engrams + 0.3 * jax.random.normal(noise, engrams.shape))
    return topics, engrams, jax.random.split(ties, batch)
