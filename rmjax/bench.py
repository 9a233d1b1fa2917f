"""How fast and how large: python -m rmjax.bench --config=configs/xlong.py prints one JSON object.

Trains nothing and writes nothing. Times are medians of many repeats, each waited for on the device. With
configs/memoria_bench.py it is steps of Memoria that are timed.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from rmjax import config as configs
from rmjax import environment, train
from rmjax.data import make_source
from rmjax.machines import memorize
from rmjax.memoria import bench as memoria_bench
from rmjax.types import Batch, Memory, MemoryMachine, Params
from rmjax.workdir import Preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed train steps.", lower_bound=1)
_HISTORIES = flags.DEFINE_multi_integer(
    "history", [100, 10_000, 1_000_000], "Items written before a single write and answer are timed.", lower_bound=1
)
_STREAMING = flags.DEFINE_bool("streaming", True, "Also time single writes and answers.")
BATCHES = (1, 256)


def bench(config: Any, repeats: int, histories: Sequence[int], said: str = "") -> dict[str, Any]:
    """Everything the module promises, as one dict; milliseconds, bytes and rates a second. said: what was set."""
    with Preemption() as stop:
        run = train.Run(config, Path(), make_source(config.data, config.data.seed), stop)
        result: dict[str, Any] = {"environment": said, "device": jax.devices()[0].device_kind}
        result |= bench_step(run, repeats)
        if histories:
            result["streaming"] = bench_streaming(run, histories)
    return result


def bench_step(run: train.Run, repeats: int) -> dict[str, Any]:
    """The train step on one batch of the config's data; on as many as `repeats` where they are of several shapes, all
    numbers being means over these then. `items_behind_questions`: those written before each question, for each anew."""
    stage, mapped, state, frozen, batch = train.first_step(run)
    mixed = hasattr(run.source, "buckets")
    data = train.first_batches(run, stage, repeats) if mixed else [batch] * repeats
    shapes = {b.item_mask.shape: b for b in data}
    each = {shape: train.step_costs(run, stage, state, frozen, b) for shape, b in shapes.items()}
    costs = next(iter(each.values())) | {
        name: round(statistics.mean(each[b.item_mask.shape][name] for b in data))
        for name in ("flops_per_step", "matmul_flops_per_step")
    }
    state, frozen = mapped.put(state), mapped.put(frozen)

    begin = time.perf_counter()
    compiled = mapped.compiled(state, (), frozen, batch)
    compile_seconds = time.perf_counter() - begin
    carry, times, warm = (), [], [b for b in shapes.values() for _ in range(2)]
    for b in warm + data:
        begin = time.perf_counter()
        state, carry, metrics = mapped.train_step(state, carry, frozen, b)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    times = times[len(warm) :]
    seconds = statistics.mean(times) if mixed else statistics.median(times)
    rate, work = matmul_rate(run.config.train.devices), costs["flops_per_step"]
    per_second = {
        "items": [int(b.item_mask.sum()) for b in data],
        "queries": [int(b.query_mask.sum()) for b in data],
        "items_behind_questions": [behind_questions(b) for b in data],
    }
    return costs | {
        "devices": mapped.devices,
        "batch_size": stage.batch_size,
        "compile_seconds": compile_seconds,
        "step_ms": 1e3 * seconds,
        "step_ms_fastest": 1e3 * min(times),
        "streams_per_second": stage.batch_size / seconds,
        **{f"{name}_per_second": float(np.mean(count)) / seconds for name, count in per_second.items()},
        "peak_bytes_compiled_per_device": train.cost.peak_bytes(compiled),
        "peak_bytes_process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": work / seconds / rate,
    }


def behind_questions(batch: Batch) -> int:
    """Items written before each asked question, summed: what one pass a question would have to read."""
    items = np.asarray(batch.item_mask).sum(-1)  # [B, T]
    segments = items.shape[1]
    at = np.full(batch.query_mask.shape, segments) if batch.position is None else np.asarray(batch.position)
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


def bench_streaming(run: train.Run, histories: Sequence[int]) -> dict[str, Any]:
    """Milliseconds to write one segment and to answer one query per stream, after histories of several lengths."""
    task = train.model_stage(run).task
    machine, length = task.machine, run.config.data.segment_length  # type: ignore[attr-defined]
    params = jax.jit(machine.init)(jax.random.key(run.config.seed))
    # A server keeps one set of parameters: bound, they are not handed over with every call.
    write = jax.jit(lambda memory, items, mask: memorize(machine, params, items, mask, memory).memory)
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
        for history, memory, written, answered in zip(histories, memories, writes, answers, strict=True):
            result[f"batch_{batch}_after_{history}"] = {
                "write_segment_ms": 1e3 * written,
                "answer_query_ms": 1e3 * answered,
                "memory_bytes_per_stream": train.cost.tree_bytes(memory) // batch,
            }
    return result


def some_items(run: train.Run, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Any items of the source: ids, or features."""
    if not run.source.num_items:
        return rng.normal(size=(*shape, run.source.feature_width)).astype(np.float32)  # type: ignore[attr-defined]
    return rng.integers(0, run.source.num_items, shape).astype(np.int32)


def history_memory(machine: MemoryMachine, params: Params, items: np.ndarray, length: int, chunk: int = 500) -> Memory:
    """The memory, batch 1, of a stream of these items."""
    segments = -(-len(items) // length)
    chunk = min(chunk, segments)
    total = -(-segments // chunk) * chunk * length
    mask = np.arange(total) < len(items)
    padded = np.resize(items, (total, *items.shape[1:]))
    go_on = jax.jit(lambda memory, items, mask: memorize(machine, params, items, mask, memory).memory)
    memory = jax.jit(lambda: machine.init_memory(params, 1))()
    cut = (-1, 1, chunk, length)
    for part, part_mask in zip(padded.reshape(*cut, *items.shape[1:]), mask.reshape(cut), strict=True):
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
        if "memoria" in _CONFIG.value:
            said = environment.prepare()
            print(json.dumps({"environment": said, **memoria_bench.bench(_CONFIG.value.memoria)}, indent=1))
            return 0
        configs.validate(_CONFIG.value)
        said = environment.prepare()
        histories = _HISTORIES.value if _STREAMING.value else ()
        print(json.dumps(bench(_CONFIG.value, _REPEATS.value, histories, said), indent=1))
    except (ValueError, OSError, RuntimeError) as error:
        logging.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    configs.check_flags(sys.argv, also=memoria_bench.KEYS)
    app.run(main)
