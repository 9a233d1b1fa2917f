"""What a run would cost, told before anything is allocated: bytes on each device, work, and what devices send."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from rmjax import tasks
from rmjax.data import make_source
from rmjax.data.pipeline import batches
from rmjax.io import cost
from rmjax.run import stages
from rmjax.run.step import TrainState, make_train_step
from rmjax.run.workdir import Preemption
from rmjax.types import Batch, Params


def explain(config: Any) -> dict[str, Any]:
    """Of the model's training. Shapes alone are needed, and one batch; the step is compiled and not run.

    `bytes_per_device`: what stays there, and with `temporaries` what a step needs besides. `collectives`: {operation:
    how often it is in the compiled step, and the bytes that each device gets from it}; one in a loop counts once.
    Several CPU devices stand for accelerators: each holds all its streams at once, unless `train.microbatch` is set.
    """
    with Preemption() as stop:
        run = stages.Run(config, Path(), make_source(config.data, config.data.seed), stop)
        stage, teacher = stages.model_stage(run), tasks.make_teacher(config, run.source)
        mapped, state = (
            stages.map_stage(run, stage, cut=jax.device_count() == 1),
            stages.blank_state(run, stage),
        )
        frozen = (
            () if teacher is None else jax.eval_shape(teacher.init, jax.random.key(0))["sampler"]
        )
        data = batches(
            run.source, **stages.data_settings(run), batch_size=stage.batch_size, num_steps=1
        )
        with contextlib.closing(data):
            batch = next(data)
        plain, carry = dataclasses.replace(state, carry=()), state.carry
        begin = time.monotonic()
        compiled = mapped.compiled(plain, carry, frozen, batch)
        seconds = time.monotonic() - begin
    held = {
        "parameters": mapped.bytes(plain.params),
        "optimizer": mapped.bytes(plain.opt_state),
        "frozen": mapped.bytes(frozen),
        "carry": cost.tree_bytes(carry) // mapped.devices,
        "batch": cost.tree_bytes(batch) // mapped.devices,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
    return step_costs(run, stage, state, frozen, batch) | {
        "devices": jax.device_count() if not config.train.devices else config.train.devices,
        "batch_size": stage.batch_size,
        "bytes_per_device": {name: size for name, size in held.items() if size},
        "peak_bytes_per_device": cost.peak_bytes(compiled),
        "collectives": summed(cost.collectives(compiled)),
        "compile_seconds": seconds,
    }


def summed(collectives: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """{operation: {"calls", "bytes"}}"""
    return {
        name: {
            "calls": sum(n == name for n, _ in collectives),
            "bytes": sum(b for n, b in collectives if n == name),
        }
        for name in sorted({name for name, _ in collectives})
    }


def step_costs(
    run: stages.Run, stage: stages.Stage, state: TrainState, frozen: Params, batch: Batch
) -> dict[str, int]:
    """Counts, not timings, of the model's train step."""
    task = stage.task
    memory = jax.eval_shape(lambda params: task.memory(params, 1), state.params)
    optimizer, sparse = stages.stage_optimizer(run, stage), run.config.train.sparse_items
    step = make_train_step(task, optimizer, run.config.seed, sparse_items=sparse)
    work = cost.breakdown(step, dataclasses.replace(state, carry=()), state.carry, frozen, batch)
    return {
        "parameters": cost.parameter_count(state.params),
        "memory_bytes_per_stream": cost.tree_bytes(memory),
        "flops_per_step": sum(work.values()),
        "matmul_flops_per_step": work["matmul"],
    }
