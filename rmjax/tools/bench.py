"""How fast and how large: python -m rmjax.bench --config=configs/xlong.py prints one JSON object.

Trains nothing and writes nothing. Times are medians of many repeats, each waited for on the device. With
configs/memoria_bench.py it is steps of Memoria that are timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from rmjax import config as configs
from rmjax import tasks
from rmjax.data import make_source
from rmjax.data.pipeline import batches, steps_per_epoch
from rmjax.data.source import Source
from rmjax.io import cost
from rmjax.io.progress import Stopped
from rmjax.machines import memorize
from rmjax.run import environment, loop, stages
from rmjax.run.workdir import EXIT_PREEMPTED, Preemption
from rmjax.tools import explain
from rmjax.tools import memoria_bench as memoria_bench
from rmjax.types import Batch, Memory, MemoryMachine, Params

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed train steps.", lower_bound=1)
_HISTORIES = flags.DEFINE_multi_integer(
    "history",
    [100, 10_000, 1_000_000],
    "Items written before a single write and answer are timed.",
    lower_bound=1,
)
_STREAMING = flags.DEFINE_bool(
    "streaming", True, "Also time a machine's single writes and answers."
)
BATCHES = (1, 256)


def bench(config: Any, repeats: int, histories: Sequence[int], said: str = "") -> dict[str, Any]:
    """Everything the module promises, as one dict; milliseconds, bytes and rates a second. said: what was set."""
    with Preemption() as stop:  # no longer: what is timed has nothing to save
        source = make_source(config.data, config.data.seed)
    run = stages.Run(config, Path(), source, stop)
    result: dict[str, Any] = {"environment": said, "device": jax.devices()[0].device_kind}
    result |= bench_step(run, repeats)
    if histories and not tasks.is_sequence(config):
        result["streaming"] = bench_streaming(run, histories)
    return result


class Shape(NamedTuple):
    """Of a bucket: one of its batches, how many it has in an epoch, and what an epoch has of it in all."""

    batch: Batch
    steps: int
    counts: dict[str, int]


def bench_step(run: stages.Run, repeats: int) -> dict[str, Any]:
    """The train step on one batch of the config's data. Where batches come in several shapes, each has its share of
    the repeats (three at least) and of the means, which are those of an epoch.

    `items_behind_questions`: those written before each question, counted for each anew.
    """
    stage, mapped, state, frozen, batch = stages.first_step(run)
    bucketed = isinstance(run.source, Source) and run.source.buckets("train") is not None
    shapes = epoch_shapes(run, stage) if bucketed else [Shape(batch, 1, counts_of(batch))]
    repeats = max(repeats // len(shapes), min(repeats, 3))
    steps = sum(shape.steps for shape in shapes)
    each = [explain.step_costs(run, stage, state, frozen, shape.batch) for shape in shapes]
    costs = each[0] | {
        name: round(
            sum(cost[name] * shape.steps for cost, shape in zip(each, shapes, strict=True)) / steps
        )
        for name in ("flops_per_step", "matmul_flops_per_step")
    }
    plain = dataclasses.replace(state, carry=())
    begin = time.perf_counter()
    compiled = [mapped.compiled(plain, state.carry, frozen, shape.batch) for shape in shapes]
    compile_seconds = time.perf_counter() - begin
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
    rate, work = matmul_rate(run.config.train.devices), costs["flops_per_step"]
    totals = {
        name: sum(shape.counts[name] for shape in shapes) / steps for name in shapes[0].counts
    }
    return costs | {
        "devices": mapped.devices,
        "batch_size": stage.batch_size,
        "shapes": len(shapes),
        "compile_seconds": compile_seconds,
        "step_ms": 1e3 * seconds,
        "step_ms_fastest": 1e3 * fastest,
        **{f"{name}_per_second": total / seconds for name, total in totals.items()},
        "peak_bytes_compiled_per_device": max(map(cost.peak_bytes, compiled)),
        "peak_bytes_process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": work / seconds / rate,
    }


def epoch_shapes(run: stages.Run, stage: stages.Stage) -> list[Shape]:
    """The shapes of the first epoch's batches, in order of appearance; every batch is made once."""
    steps = steps_per_epoch(run.source, stage.batch_size)
    data = batches(
        run.source, **stages.data_settings(run), batch_size=stage.batch_size, num_steps=steps
    )
    found: dict[tuple, Shape] = {}
    with contextlib.closing(data):
        for batch in data:
            before = found.get(
                batch.item_mask.shape, Shape(batch, 0, dict.fromkeys(counts_of(batch), 0))
            )
            counts = {name: before.counts[name] + count for name, count in counts_of(batch).items()}
            found[batch.item_mask.shape] = Shape(before.batch, before.steps + 1, counts)
    return list(found.values())


def counts_of(batch: Batch) -> dict[str, int]:
    return {
        "streams": len(batch.example_id),
        "items": int(batch.item_mask.sum()),
        "queries": int(batch.query_mask.sum()),
        "items_behind_questions": behind_questions(batch),
    }


def behind_questions(batch: Batch) -> int:
    """Items written before each asked question, summed: what one pass a question would have to read."""
    items = np.asarray(batch.item_mask).sum(-1)  # [B, T]
    segments = items.shape[1]
    at = (
        np.full(batch.query_mask.shape, segments)
        if batch.position is None
        else np.asarray(batch.position)
    )
    before = np.concatenate([np.zeros_like(items[:, :1]), items.cumsum(1)], 1)
    return int(np.where(batch.query_mask, np.take_along_axis(before, at, 1), 0).sum())


def matmul_rate(count: int = 0, size: int = 4096, dtype: Any = jnp.float32) -> float:
    """Floating-point operations a second of a large product over `count` devices (0: all): this run's yardstick."""
    devices = jax.local_devices()[: count or None]
    size = size if devices[0].platform != "cpu" else 2048
    x = jax.pmap(lambda key: jax.random.normal(key, (size, size), dtype), devices=devices)(
        jax.random.split(jax.random.key(0), len(devices))
    )
    (seconds,) = timed([partial(jax.pmap(lambda x: x @ x, devices=devices), x)])
    return len(devices) * 2 * size**3 / seconds


def bench_streaming(run: stages.Run, histories: Sequence[int]) -> dict[str, Any]:
    """Milliseconds to write one segment and to answer one query per stream, after histories of several lengths."""
    task = stages.model_stage(run).task
    machine, length = task.machine, run.config.data.segment_length  # type: ignore[attr-defined,union-attr]
    params = jax.jit(machine.init)(jax.random.key(run.config.seed))
    # A server keeps one set of parameters: bound, they are not handed over with every call.
    write = jax.jit(
        lambda memory, items, mask: memorize(machine, params, items, mask, memory).memory
    )
    answer = jax.jit(lambda memory, query, mask: machine.read(params, memory, query, mask))
    rng = np.random.default_rng(run.config.seed)
    pasts = [history_memory(machine, params, some_items(run, rng, n), length) for n in histories]
    result: dict[str, Any] = {}
    for batch in BATCHES:
        items = jnp.asarray(some_items(run, rng, batch, 1, length))
        query = jnp.asarray(rng.normal(size=(batch, 1, run.config.machine.dim)), jnp.float32)
        every = jnp.ones(items.shape[:3], bool)
        memories = [jax.tree.map(lambda x: jnp.repeat(x, batch, 0), past) for past in pasts]  # noqa: B023
        writes = timed([partial(write, memory, items, every) for memory in memories])
        answers = timed([partial(answer, memory, query, every[:, 0, :1]) for memory in memories])
        for history, memory, written, answered in zip(
            histories, memories, writes, answers, strict=True
        ):
            result[f"batch_{batch}_after_{history}"] = {
                "write_segment_ms": 1e3 * written,
                "answer_query_ms": 1e3 * answered,
                "memory_bytes_per_stream": cost.tree_bytes(memory) // batch,
            }
    return result


def some_items(run: stages.Run, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Any items of the source: ids, or features."""
    if not run.source.num_items:
        return rng.normal(size=(*shape, run.source.feature_width)).astype(np.float32)  # type: ignore[attr-defined,union-attr]
    return rng.integers(0, run.source.num_items, shape).astype(np.int32)


def history_memory(
    machine: MemoryMachine, params: Params, items: np.ndarray, length: int, chunk: int = 500
) -> Memory:
    """The memory, batch 1, of a stream of these items."""
    segments = -(-len(items) // length)
    chunk = min(chunk, segments)
    total = -(-segments // chunk) * chunk * length
    mask = np.arange(total) < len(items)
    padded = np.resize(items, (total, *items.shape[1:]))
    go_on = jax.jit(
        lambda memory, items, mask: memorize(machine, params, items, mask, memory).memory
    )
    memory = jax.jit(lambda: machine.init_memory(params, 1))()
    cut = (-1, 1, chunk, length)
    for part, part_mask in zip(
        padded.reshape(*cut, *items.shape[1:]), mask.reshape(cut), strict=True
    ):
        memory = go_on(memory, part, part_mask)
    return jax.block_until_ready(memory)


def timed(calls: list[Callable], budget: float = 1.0, least: int = 10) -> list[float]:
    """Median seconds of each call, over as many as fit the budget (seconds each); compilation left out.

    The calls take turns, so that a machine that is slow for a while is slow for all of them.
    """
    for call in calls * 3:
        jax.block_until_ready(call())
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - start < budget * len(calls):
        for call, its_times in zip(calls, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            its_times.append(time.perf_counter() - begin)
    return [statistics.median(its_times) for its_times in times]


def main(argv: Sequence[str]) -> int:
    del argv
    logging.set_verbosity(logging.INFO)
    try:
        if "data" not in _CONFIG.value:  # a card of rows of Memoria
            said = environment.prepare()
            environment.find_devices()
            print(
                json.dumps(
                    {"environment": said, **memoria_bench.bench(_CONFIG.value.memoria)}, indent=1
                )
            )
            return 0
        configs.validate(_CONFIG.value)
        said = environment.prepare()
        environment.find_devices()
        histories = _HISTORIES.value if _STREAMING.value else ()
        print(json.dumps(bench(_CONFIG.value, _REPEATS.value, histories, said), indent=1))
    except Stopped as stopped:
        logging.warning("Stopped: %s.", stopped)
        return EXIT_PREEMPTED
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def cli() -> None:
    """The command `python -m rmjax.bench`."""
    flags.mark_flag_as_required("config")
    configs.check_flags(sys.argv, also=memoria_bench.KEYS)
    app.run(main, flags_parser=configs.parse_flags)
