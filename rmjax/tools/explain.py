"""Predicts the cost of a run before anything is allocated: memory, work and communication."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rmjax import tasks
from rmjax.data import make_source
from rmjax.data.pipeline import batches
from rmjax.data.source import Source
from rmjax.data.texts.streams import Texts
from rmjax.io import cost
from rmjax.run import stages
from rmjax.run.step import TrainState, make_train_step
from rmjax.run.workdir import Preemption
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Batch, Params, Task, at


def report(
    config: ConfigDict, source: Source | Texts | None = None, cut: bool | None = None
) -> dict[str, Any]:
    """Reports what the training of the model would cost.

    Only shapes and one batch are needed: the train step is compiled, but not run. Several CPU
    devices stand for accelerators: each device holds all its streams at once, unless
    `train.microbatch` is set.

    Args:
      config: of the run.
      source: the data; None: those of the config.
      cut: whether a CPU holds few streams at once; None: if it is the only device.

    Returns:
      The counts of `step_costs`; the batch size and the number of devices; compile_seconds; and
      bytes_per_device: {what stays on a device, or the 'temporaries' of a step: bytes};
      peak_bytes_per_device: their maximum during a step;
      collectives: see `totals`. An operation in a loop counts once.

    Raises:
      ValueError, FileNotFoundError: the data of the config cannot be opened.
    """
    with Preemption() as stop:
        source = make_source(config.data, config.data.seed) if source is None else source
        run = stages.Run(config, Path(), source, stop)
        stage, teacher = stages.model_stage(run), tasks.make_teacher(config, run.source)
        mapped = stages.map_stage(run, stage, cut=jax.device_count() == 1 if cut is None else cut)
        state, frozen = stages.blank_state(run, stage), ()
        if teacher is not None:
            frozen = jax.eval_shape(teacher.init, jax.random.key(0))["sampler"]
        settings = stages.data_settings(run)
        data = batches(run.source, **settings, batch_size=stage.batch_size, num_steps=1)
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
        "devices": config.train.devices or jax.device_count(),
        "batch_size": stage.batch_size,
        "bytes_per_device": {name: size for name, size in held.items() if size},
        "peak_bytes_per_device": cost.peak_bytes(compiled),
        "collectives": totals(cost.collectives(compiled)),
        "compile_seconds": seconds,
    }


def totals(collectives: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Adds up the collective operations of a compiled step.

    Args:
      collectives: (operation, bytes that each device receives) of every call.

    Returns:
      {operation: {'calls': number of calls, 'bytes': bytes that each device receives}}.
    """
    return {
        name: {
            "calls": sum(n == name for n, _ in collectives),
            "bytes": sum(b for n, b in collectives if n == name),
        }
        for name in sorted({name for name, _ in collectives})
    }


def step_costs(
    run: stages.Run, stage: stages.Stage, state: TrainState, frozen: Params, batch: Batch
) -> dict[str, Any]:
    """Counts what a train step does, without running it.

    Args:
      run: the run.
      stage: the training, which names the task.
      state: the state of the training; shapes are enough.
      frozen: parameters that are not trained; shapes are enough.
      batch: one batch.

    Returns:
      parameters: their number; parameters_by_part: of each part, see `_by_part`;
      memory_bytes_per_stream; flops_per_step, and of these matmul_flops_per_step.
    """
    task = stage.task
    memory = jax.eval_shape(lambda params: task.memory(params, 1), state.params)
    optimizer, sparse = stages.stage_optimizer(run, stage), run.config.train.sparse_items
    step = make_train_step(task, optimizer, run.config.seed, sparse_items=sparse)
    work = cost.breakdown(step, dataclasses.replace(state, carry=()), state.carry, frozen, batch)
    return {
        "parameters": cost.parameter_count(state.params),
        "parameters_by_part": _by_part(task, state.params),
        "memory_bytes_per_stream": cost.tree_bytes(memory),
        "flops_per_step": sum(work.values()),
        "matmul_flops_per_step": work["matmul"],
    }


def _by_part(task: Task, params: Params) -> dict[str, int]:
    """The parameters of each part, which add up to all of them.

    The final table of a run has two of these counts: 'machine', which is the memory and its reader,
    and 'item table'. A model without a memory machine is one part, 'model'.
    """
    if not isinstance(task, Reasoning):
        return {"model": cost.parameter_count(params)}
    counts = {name: cost.parameter_count(part) for name, part in params.items()}
    if task.table is not None:
        table = int(at(params, task.table).size)
        counts[task.table[0]] -= table
        counts["item table"] = table
    return counts
