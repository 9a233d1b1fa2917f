"""What the bench times in turns with another process, and the table over all memories."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.io import cost
from rmjax.registry import MACHINES
from rmjax.run import loop, stages
from rmjax.tools import explain, made_up, measures

WORK = ("train", *(f"{kind}_{batch}" for kind in ("write", "answer") for batch in measures.BATCHES))
HISTORY = 1000  # items that streams have before a write or an answer is timed
# The event that JAX records for every program that XLA compiles.
_COMPILED = "/jax/core/compile/backend_compile_duration"
Fields = dict[str, Any]  # of a JSON object


def make(run: stages.Run, what: str) -> tuple[Callable[[], object], Fields]:
    """Makes one piece of work of a run.

    Args:
      run: the run.
      what: one of `WORK`: a train step; or one segment written, or one question answered, for 1 or
        256 streams.

    Returns:
      A call that does the work and waits until it is done; and flops, those of one call.
    """
    if what == "train":
        step, costs, _ = train_step(run)
        return step, {"flops": costs["flops_per_step"]}
    kind, _, batch = what.partition("_")
    programs, rng = measures.streaming(run), np.random.default_rng(run.config.seed)
    items, length = measures.some_items(run, rng, HISTORY), run.config.data.segment_length
    past = measures.history_memory(programs.machine, programs.params, items, length)
    memory = jax.tree.map(lambda x: jnp.repeat(x, int(batch), 0), past)
    segment, query = measures.segment_and_query(run, rng, int(batch))
    program = programs.write if kind == "write" else programs.answer
    arguments = (memory, *(segment if kind == "write" else query))
    call = lambda: jax.block_until_ready(program(*arguments))
    return call, {"flops": cost.flops(program, *arguments)}


def train_step(
    run: stages.Run,
) -> tuple[Callable[[], object], dict[str, int], Callable[[], int]]:
    """Makes the train step of a run.

    Args:
      run: the run.

    Returns:
      A call that takes the next step, always on one batch, and waits for it; the counts of
      `explain.step_costs`; and a call that compiles the step for the bytes that it needs.
    """
    stage, mapped, state, frozen, batch = stages.first_step(run)
    costs = explain.step_costs(run, stage, state, frozen, batch)
    arguments = dataclasses.replace(state, carry=()), state.carry, frozen, batch
    peak = lambda: cost.peak_bytes(mapped.compiled(*arguments))
    (state, carry), frozen = loop.put_state(mapped, state), mapped.put(frozen)

    def step() -> object:
        nonlocal state, carry
        state, carry, metrics = mapped.train_step(state, carry, frozen, batch)
        return jax.block_until_ready((state, metrics))[1]

    return step, costs, peak


def about(count: int = 0) -> Fields:
    """Describes this machine and how fast it multiplies matrices.

    Args:
      count: number of devices; 0: all.

    Returns:
      processor: its model; cores: those that this process may use; device, devices, jax; and
      matmul_flops_per_second: {dtype: rate of a large product}, see `measures.matmul_rate`.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text()
    except OSError:
        lines = ""
    model = re.search(r"(?m)^(?:model name|Hardware)\s*:\s*(.*)$", lines)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rates = {
        dtype: measures.matmul_rate(count, dtype=jnp.dtype(dtype))
        for dtype in ("float32", "bfloat16")
    }
    return {
        "processor": model[1] if model else "unknown",
        "cores": cores,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "matmul_flops_per_second": rates,
    }


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Lists the programs that XLA compiles meanwhile, one entry each."""
    programs: list[str] = []

    def listen(event: str, duration_secs: float, **more: str | int) -> None:
        if event == _COMPILED:
            programs.append(str(more.get("fun_name", "a program")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure_machine(kind: str, size: str, repeats: int, changes: Fields | None = None) -> Fields:
    """Measures the train step of a machine at a size.

    Args:
      kind: of the machine.
      size: a row of `made_up.SIZES`.
      repeats: number of timed steps, after two others.
      changes: other changes of the config.

    Returns:
      machine; step_ms, the median; step_ms_fastest; peak_bytes, of the compiled step; compilations
      during the steps after the first one, which should be 0; flops. Or machine and error, if the
      machine cannot be trained at this size.
    """
    try:
        config, source = made_up.sized(size, {"machine.kind": kind} | (changes or {}))
        step, costs, peak = train_step(measures.open_run(config, source))
        step()
        times = []
        with counted_compilations() as programs:
            for _ in range(repeats + 1):
                begin = time.perf_counter()
                step()
                times.append(time.perf_counter() - begin)
    except (ValueError, NotImplementedError) as error:
        return {"machine": kind, "error": str(error)}
    return {
        "machine": kind,
        "step_ms": 1e3 * statistics.median(times[1:]),
        "step_ms_fastest": 1e3 * min(times[1:]),
        "peak_bytes": peak(),
        "compilations": len(programs),
        "flops": costs["flops_per_step"],
    }


def with_share(compared: Fields) -> Fields:
    """Adds to the result of `turns.compare` how close our work comes to large matrix products.

    Args:
      compared: the result.

    Returns:
      The result, with ms and share_of_matmul_rate: the work's operations a second over those of a
      large float32 product.
    """
    seconds = statistics.median(ours for ours, _ in compared["seconds"])
    rate = compared["ours"]["matmul_flops_per_second"]["float32"]
    share = compared["ours"]["flops"] / seconds / rate
    peaks = {f"peak_bytes_{who}": compared[who]["peak_bytes"] for who in ("ours", "theirs")}
    return {"ms": 1e3 * seconds, "share_of_matmul_rate": share} | peaks | compared


def machines(asked: str) -> list[str]:
    """The machines that a flag names.

    Args:
      asked: 'all', or kinds separated by commas.

    Returns:
      The kinds.

    Raises:
      ValueError: there is no such kind.
    """
    kinds = list(MACHINES) if asked == "all" else asked.split(",")
    for kind in kinds:
        MACHINES[kind]
    return kinds


def markdown(row: Fields, before: Sequence[str] = ()) -> str:
    """A row of a table in Markdown.

    Args:
      row: {column: number or text}. Numbers get four digits.
      before: the columns of the row before; other ones begin a table.

    Returns:
      The row; if it begins a table, below an empty line and the head.
    """
    shown = lambda value: f"{value:,.4g}" if isinstance(value, float) else str(value)
    lines = [[shown(value) for value in row.values()]]
    if tuple(row) != tuple(before):
        lines = [list(row), ["---"] * len(row), *lines]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"\n{text}" if before and len(lines) > 1 else text
