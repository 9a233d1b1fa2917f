"""Times a train step, single writes and answers, and large matrix products."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from rmjax import tasks
from rmjax.data import make_source
from rmjax.data.pipeline import batches, steps_per_epoch
from rmjax.data.source import Source
from rmjax.data.texts.streams import Texts
from rmjax.io import cost
from rmjax.machines import memorize
from rmjax.run import environment, loop, stages
from rmjax.run.mapping import Mapped
from rmjax.run.step import TrainState
from rmjax.run.workdir import Preemption
from rmjax.tasks.reasoning import Reasoning
from rmjax.tools import explain
from rmjax.types import Array, Batch, Memory, MemoryMachine, Params

BATCHES = (1, 256)  # streams
Measures = dict[str, Any]  # {name: number or text}, or nested


def measure(
    config: ConfigDict,
    repeats: int,
    histories: Sequence[int],
    setup: str = "",
    source: Source | None = None,
) -> Measures:
    """Measures the train step, and for machines single writes and answers.

    Args:
      config: of a run.
      repeats: number of timed train steps.
      histories: lengths of history, in items; [] leaves out single writes and answers.
      setup: what was set for this process, see `environment.prepare`; it is reported.
      source: the data; None: those of the config.

    Returns:
      The object that is printed: 'environment', 'device', the measures of `bench_step`, and
      'streaming', see `bench_streaming`.

    Raises:
      ValueError, FileNotFoundError: the data of the config cannot be opened.
    """
    run = open_run(config, source)
    result: Measures = {"environment": setup, "device": jax.devices()[0].device_kind}
    result |= bench_step(run, repeats)
    if histories and not tasks.is_sequence(config):
        result["streaming"] = bench_streaming(run, histories)
    return result


def open_run(config: ConfigDict, source: Source | Texts | None = None) -> stages.Run:
    """Opens a run to time, which writes no files.

    Args:
      config: of the run.
      source: the data; None: those of the config.

    Returns:
      The run.

    Raises:
      ValueError, FileNotFoundError: the data of the config cannot be opened.
    """
    with Preemption() as stop:  # only for the data: the timed steps have nothing to save
        source = make_source(config.data, config.data.seed) if source is None else source
    return stages.Run(config, Path(), source, stop)


class Shape(NamedTuple):
    """Batches of an epoch whose steps take equally long, and their share of it.

    Some models skip the segments that are empty in all streams. So the arrays of these batches have
    one shape, and their last items are in the same segment.

    Attributes:
      batch: one of these batches.
      steps: number of such batches in an epoch.
      counts: the counts of `counts_of`, summed over these batches.
    """

    batch: Batch
    steps: int
    counts: dict[str, int]


def bench_step(run: stages.Run, repeats: int) -> Measures:
    """Times the train step on a batch of the config's data.

    If batches are of several kinds, see `Shape`, each is timed in an equal share of the repeats, at
    least three. The results are then means over the steps of an epoch.

    Args:
      run: the run.
      repeats: number of timed steps; 0: the step is compiled, and does not run.

    Returns:
      The counts of `explain.step_costs`; times in milliseconds and seconds; rates a second of the
      counts of `counts_of`; memory peaks in bytes; and the share of the rate of a large matrix
      product, see `matmul_rate`. Without repeats only what the compiled program tells.
    """
    stage, mapped, state, frozen, batch = stages.first_step(run)
    bucketed = isinstance(run.source, Source) and run.source.buckets("train") is not None
    shapes = epoch_shapes(run, stage) if bucketed else [Shape(batch, 1, counts_of(batch))]
    repeats = max(repeats // len(shapes), min(repeats, 3))
    steps = sum(shape.steps for shape in shapes)
    parts = [explain.step_costs(run, stage, state, frozen, shape.batch) for shape in shapes]
    costs = dict(parts[0])
    for name in ("flops_per_step", "matmul_flops_per_step"):
        total = sum(p[name] * shape.steps for p, shape in zip(parts, shapes, strict=True))
        costs[name] = round(total / steps)
    plain = dataclasses.replace(state, carry=())
    begin = time.perf_counter()
    programs = one_of_each(shape.batch for shape in shapes)
    compiled = [mapped.compiled(plain, state.carry, frozen, batch) for batch in programs]
    result = costs | {
        "devices": mapped.devices,
        "batch_size": stage.batch_size,
        "shapes": len(programs),
        "compile_seconds": time.perf_counter() - begin,
        "peak_bytes_compiled_per_device": max(map(cost.peak_bytes, compiled)),
    }
    if not repeats:
        return result
    seconds, fastest = _step_seconds(mapped, state, frozen, shapes, repeats)
    rate, work = matmul_rate(run.config.train.devices), costs["flops_per_step"]
    totals = {
        name: sum(shape.counts[name] for shape in shapes) / steps for name in shapes[0].counts
    }
    return result | {
        "step_ms": 1e3 * seconds,
        "step_ms_fastest": 1e3 * fastest,
        **{f"{name}_per_second": total / seconds for name, total in totals.items()},
        "peak_bytes_process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": work / seconds / rate,
    }


def _step_seconds(
    mapped: Mapped, state: TrainState, frozen: Params, shapes: Sequence[Shape], repeats: int
) -> tuple[float, float]:
    """Times steps; returns median and least seconds, as means over the steps of an epoch."""
    steps = sum(shape.steps for shape in shapes)
    (state, carry), frozen = loop.put_state(mapped, state), mapped.put(frozen)
    seconds, fastest = 0.0, 0.0
    for shape in shapes:
        times = []
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            state, carry, metrics = mapped.train_step(state, carry, frozen, shape.batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - begin)
        seconds += statistics.median(times[2:]) * shape.steps / steps
        fastest += min(times[2:]) * shape.steps / steps
    return seconds, fastest


def epoch_shapes(run: stages.Run, stage: stages.Stage) -> list[Shape]:
    """Lists the kinds of batches in the first epoch; every batch is made once.

    Args:
      run: the run.
      stage: the training, which gives the batch size.

    Returns:
      The kinds, in order of appearance, see `Shape`.
    """
    steps, settings = steps_per_epoch(run.source, stage.batch_size), stages.data_settings(run)
    data = batches(run.source, **settings, batch_size=stage.batch_size, num_steps=steps)
    shapes: dict[tuple, Shape] = {}
    with contextlib.closing(data):
        for batch in data:
            segments = np.flatnonzero(np.asarray(batch.item_mask).any((0, 2)))
            counts, key = counts_of(batch), (*batch.item_mask.shape, segments.max(initial=-1))
            before = shapes.get(key, Shape(batch, 0, dict.fromkeys(counts, 0)))
            total = {name: before.counts[name] + count for name, count in counts.items()}
            shapes[key] = Shape(before.batch, before.steps + 1, total)
    return list(shapes.values())


def one_of_each(several: Iterable[Batch]) -> list[Batch]:
    """The first batch of every shape; each shape is a program to compile."""
    first: dict[tuple[int, ...], Batch] = {}
    for batch in several:
        first.setdefault(batch.item_mask.shape, batch)
    return list(first.values())


def counts_of(batch: Batch) -> dict[str, int]:
    """Counts what a batch holds.

    Args:
      batch: the batch.

    Returns:
      {'streams', 'items', 'queries', 'items_behind_questions'}, see `behind_questions`.
    """
    return {
        "streams": len(batch.example_id),
        "items": int(batch.item_mask.sum()),
        "queries": int(batch.query_mask.sum()),
        "items_behind_questions": behind_questions(batch),
    }


def behind_questions(batch: Batch) -> int:
    """Counts the items that would be read if every question had its own pass over the stream.

    Args:
      batch: the batch.

    Returns:
      The number of items before a question, summed over the questions.
    """
    items = np.asarray(batch.item_mask).sum(-1)  # [B, T]
    if batch.position is None:
        at = np.full(batch.query_mask.shape, items.shape[1])
    else:
        at = np.asarray(batch.position)
    before = np.concatenate([np.zeros_like(items[:, :1]), items.cumsum(1)], 1)
    return int(np.where(batch.query_mask, np.take_along_axis(before, at, 1), 0).sum())


def matmul_rate(count: int = 0, size: int = 4096, dtype: DTypeLike = jnp.float32) -> float:
    """Measures how fast a large matrix product runs, to compare the train step with.

    Args:
      count: number of devices; 0: all.
      size: rows and columns of the matrices; 2048 on a CPU.
      dtype: of the matrices.

    Returns:
      Floating-point operations a second, summed over the devices.
    """
    devices = jax.local_devices()[: count or None]
    size = size if devices[0].platform != "cpu" else 2048
    keys = jax.random.split(jax.random.key(0), len(devices))
    draw = lambda key: jax.random.normal(key, (size, size), dtype)
    x = jax.pmap(draw, devices=devices)(keys)
    (seconds,) = timed([partial(jax.pmap(lambda x: x @ x, devices=devices), x)])
    return len(devices) * 2 * size**3 / seconds


def bench_streaming(run: stages.Run, histories: Sequence[int]) -> Measures:
    """Times a write of one segment, and one query a stream, after histories of several lengths.

    Args:
      run: a run that trains a machine.
      histories: lengths of history, in items.

    Returns:
      {'batch_<streams>_after_<items>': {'write_segment_ms', 'answer_query_ms',
      'memory_bytes_per_stream'}}.
    """
    machine, params, write, answer = streaming(run)
    length = run.config.data.segment_length
    rng = np.random.default_rng(run.config.seed)
    pasts = [history_memory(machine, params, some_items(run, rng, n), length) for n in histories]
    result: Measures = {}
    for batch in BATCHES:
        segment, query = segment_and_query(run, rng, batch)
        memories = [jax.tree.map(lambda x: jnp.repeat(x, batch, 0), past) for past in pasts]  # noqa: B023
        writes = timed([partial(write, memory, *segment) for memory in memories])
        answers = timed([partial(answer, memory, *query) for memory in memories])
        rows = zip(histories, memories, writes, answers, strict=True)
        for history, memory, written, answered in rows:
            result[f"batch_{batch}_after_{history}"] = {
                "write_segment_ms": 1e3 * written,
                "answer_query_ms": 1e3 * answered,
                "memory_bytes_per_stream": cost.tree_bytes(memory) // batch,
            }
    return result


class Streaming(NamedTuple):
    """What a server runs.

    Attributes:
      machine: the machine.
      params: its parameters, fresh ones.
      write: (memory, items [B, 1, N, ...], mask [B, 1, N]) -> memory; writes one segment.
      answer: (memory, query f32 [B, 1, d], mask [B, 1]) -> answers; asks one question.
    """

    machine: MemoryMachine
    params: Params
    write: Callable[[Memory, Array, Array], Memory]
    answer: Callable[[Memory, Array, Array], Array]


def streaming(run: stages.Run) -> Streaming:
    """Builds the programs that write a segment and answer a question.

    Args:
      run: a run that trains a machine.

    Returns:
      The jitted programs, in the precision of the config. As in a server, the parameters are their
      constants: no call passes them.
    """
    task = stages.model_stage(run).task
    assert isinstance(task, Reasoning)
    machine = task.machine
    drawn = environment.on_host(jax.jit(machine.init), jax.random.key(run.config.seed))
    params = jax.device_put(drawn)

    @jax.jit
    def write(memory: Memory, items: Array, mask: Array) -> Memory:
        return memorize(machine, params, items, mask, memory).memory

    answer = jax.jit(lambda memory, query, mask: machine.read(params, memory, query, mask))
    precise = partial(stages.in_precision, compute_dtype=run.config.train.compute_dtype)
    return Streaming(machine, params, precise(write), precise(answer))


def segment_and_query(
    run: stages.Run, rng: np.random.Generator, batch: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Draws one segment and one question for each of some streams.

    Args:
      run: the run.
      rng: draws them.
      batch: number of streams.

    Returns:
      The arguments of `Streaming.write`, and those of `Streaming.answer`, without the memory.
    """
    items = jnp.asarray(some_items(run, rng, batch, 1, run.config.data.segment_length))
    query = jnp.asarray(rng.normal(size=(batch, 1, run.config.machine.dim)), jnp.float32)
    mask = jnp.ones(items.shape[:3], bool)
    return (items, mask), (query, mask[:, 0, :1])


def some_items(run: stages.Run, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draws random items like those of the run's source.

    Args:
      run: the run.
      rng: draws them.
      *shape: shape of the result, without the features.

    Returns:
      Ids i32 [*shape], or features f32 [*shape, F] if the source has no ids.
    """
    if not run.source.num_items:
        return rng.normal(size=(*shape, run.source.feature_width)).astype(np.float32)
    return rng.integers(0, run.source.num_items, shape).astype(np.int32)


def history_memory(
    machine: MemoryMachine, params: Params, items: np.ndarray, length: int, chunk: int = 500
) -> Memory:
    """Writes one stream of items to a memory.

    Args:
      machine: the machine.
      params: of the machine.
      items: ids i32 [n], or features f32 [n, F].
      length: of a segment, in items.
      chunk: segments that one call writes.

    Returns:
      The memory after all items, leading axis 1.
    """
    segments = -(-len(items) // length)
    chunk = min(chunk, segments)
    total = -(-segments // chunk) * chunk * length
    mask = np.arange(total) < len(items)
    padded = np.resize(items, (total, *items.shape[1:]))
    write = jax.jit(
        lambda memory, items, mask: memorize(machine, params, items, mask, memory).memory
    )
    memory = jax.jit(lambda: machine.init_memory(params, 1))()
    cut = (-1, 1, chunk, length)
    parts = padded.reshape(*cut, *items.shape[1:])
    for part, part_mask in zip(parts, mask.reshape(cut), strict=True):
        memory = write(memory, part, part_mask)
    return jax.block_until_ready(memory)


def timed(
    calls: Sequence[Callable[[], object]], budget: float = 1.0, least: int = 10
) -> list[float]:
    """Times calls after they are compiled.

    The calls take turns, so that a machine that is slow for a while is slow for all of them.

    Args:
      calls: functions without arguments, which return arrays.
      budget: seconds that every call may take in total.
      least: number of times that every call is timed at least.

    Returns:
      The median seconds of every call.
    """
    for call in [*calls] * 3:
        jax.block_until_ready(call())
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - start < budget * len(calls):
        for call, seconds in zip(calls, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in times]
