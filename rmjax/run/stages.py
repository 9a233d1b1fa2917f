"""A stage of training: its task over the devices, and the state that it begins with."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils

from rmjax import schedules, tasks
from rmjax.data.pipeline import batches
from rmjax.data.stories.vectors import word_vectors
from rmjax.io import paths
from rmjax.io.checkpoint import Checkpoints
from rmjax.io.progress import Stopped
from rmjax.run import kept
from rmjax.run.mapping import Mapped, make_mapped
from rmjax.run.optimizer import make_optimizer
from rmjax.run.reporting import MetricWriter
from rmjax.run.step import Pieces, TrainState, init_state
from rmjax.run.workdir import Preemption
from rmjax.tasks import sequences
from rmjax.types import Batch, Logger, Params, Task, at, replace_at

CPU_ITEMS = 8192  # of the streams that a CPU holds at once, see `microbatch`


class Preempted(Stopped):
    """The run was asked to stop, and everything it had is saved."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: the teacher's or the model's."""

    name: str
    task: Task
    steps: int
    batch_size: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages share."""

    config: Any
    workdir: Path
    source: Any  # a Source, or Texts
    stop: Preemption
    asked: Asked = dataclasses.field(default_factory=lambda: Asked())
    task: Task | None = None  # one of the user's, in place of config's
    loggers: Sequence[Logger] = ()  # the user's, see `fit`

    def stopping(self, step: int = 0) -> bool:
        """Whether to save and leave. All processes must leave at one step, so several of them ask each other, every
        `train.log_every` steps, or ten seconds where those take longer: it holds up the devices.
        """
        if jax.process_count() == 1:
            return self.stop.requested
        last, now = self.asked, time.monotonic()
        if last.step < step < last.again:
            return False
        pace = (now - last.time) / max(1, step - last.step)
        requested, pace = np.max(
            multihost_utils.process_allgather(np.array([self.stop.requested, pace])), 0
        )
        last.step, last.time = step, now
        last.again = step + int(
            np.clip(10 / max(pace, 1e-6), 1, self.config.train.log_every)
        )  # of all the same
        return bool(requested)


class Training(NamedTuple):
    """A stage under way: what its loop works with, and where it writes."""

    run: Run
    stage: Stage
    mapped: Mapped
    checkpoints: Checkpoints
    writer: MetricWriter


@dataclasses.dataclass
class Asked:
    """When processes last asked each other, and from what step on they do again."""

    step: int = 0
    again: int = 0
    time: float = dataclasses.field(default_factory=time.monotonic)


def model_stage(run: Run) -> Stage:
    t = run.config.train
    task = tasks.make_task(run.config, run.source) if run.task is None else run.task
    return Stage("model", task, t.steps, t.batch_size, t.learning_rate)


def stage_optimizer(run: Run, stage: Stage) -> optax.GradientTransformation:
    t = run.config.train
    warmup = round(t.warmup * stage.steps)
    schedule = schedules.build(t.schedule, max(1, stage.steps - warmup), run.config)
    return make_optimizer(stage.learning_rate, t.clip, schedule, warmup)


def map_stage(run: Run, stage: Stage, cut: bool = True) -> Mapped:
    """The stage's steps over the devices; raises ValueError if its batches do not divide among them. cut=False: CPUs
    hold all rows at once too, unless `train.microbatch` says how many.
    """
    t, optimizer = run.config.train, stage_optimizer(run, stage)
    devices = max(1, (t.devices or jax.device_count()) // t.model_devices)
    section = "teacher" if stage.name == "teacher" else "train"
    for name, size in (
        (f"{section}.batch_size", stage.batch_size),
        ("train.eval_batch_size", t.eval_batch_size),
    ):
        if size % devices:
            raise ValueError(
                f"config.{name} = {size} does not divide among {devices} devices: change it, or config.train.devices"
            )
    whole = stage.name == "teacher" or not (cut or t.microbatch)
    pieces = None if whole else microbatch(run, stage.batch_size // devices)
    mapped = make_mapped(
        stage.task,
        optimizer,
        run.config.seed,
        mapping=t.mapping,
        devices=t.devices,
        model_devices=t.model_devices,
        microbatch=pieces,
        sparse_items=t.sparse_items,
        split_layers=t.split_layers,
    )
    return mapped._replace(
        train_step=announced(mapped.train_step, f"{stage.name}: compiling the train step"),
        scores=announced(mapped.scores, f"{stage.name}: compiling the evaluation step"),
        measure=announced(mapped.measure, f"{stage.name}: compiling the evaluation step"),
        rehearsals=announced(mapped.rehearsals, f"{stage.name}: compiling the memory gain"),
    )


def announced(step: Callable, doing: str) -> Callable:
    """`step`, which logs its compilation and the seconds it took whenever a batch, its last argument,
    has new shapes.
    """
    seen: set[tuple] = set()

    def call(*given: Any) -> Any:
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(given[-1]))
        if shapes in seen:
            return step(*given)
        logging.info("%s ...", doing)
        begin = time.monotonic()
        result = step(*given)
        seen.add(shapes)
        logging.info("%s: done in %.1f seconds.", doing, time.monotonic() - begin)
        return result

    return call


def microbatch(run: Run, rows: int) -> Pieces | None:
    """How many of its `rows` streams a device holds at once, None for all of them.

    On a CPU a few: activations that outgrow its caches by far, and memory that is mapped anew in every step, cost more
    than the pieces. Elsewhere all of them: a piece is a scan of small kernels, each of which has to be launched.
    """
    asked = run.config.train.microbatch
    if rows % (asked or 1):
        raise ValueError(
            f"config.train.microbatch = {asked} does not divide the {rows} streams of a device: change it, or take 0"
        )
    if asked:
        return lambda rows, items: asked
    if jax.devices()[0].platform != "cpu":
        return None

    def pieces(rows: int, items: int) -> int:
        best = max(
            4, CPU_ITEMS / items
        )  # fewer are slow however long: the scan's products become thin
        return min(
            (m for m in range(1, rows + 1) if rows % m == 0), key=lambda m: abs(math.log(m / best))
        )

    return pieces


def fresh_state(run: Run, stage: Stage, frozen: Params = ()) -> TrainState:
    """The state at step 0, on the host; a function of the seed, and of what the config takes from elsewhere: another
    run's parameters, a released checkpoint's, the teacher's item table, word vectors.
    """
    optimizer = stage_optimizer(run, stage)
    state = jax.device_get(
        jax.jit(lambda key: init_state(stage.task, optimizer, key))(jax.random.key(run.config.seed))
    )
    if stage.task.carries:
        state = dataclasses.replace(
            state, carry=fresh_carry(stage.task, state.params, stage.batch_size)
        )
    start = stage.name == "model" and run.config.train.start_from
    if start:
        state = dataclasses.replace(state, params=read_start(run, stage))
    elif tasks.is_sequence(run.config) and run.config.model.pretrained:
        state = dataclasses.replace(state, params=sequences.pretrained(run.config, state.params))
    rows: Any = None
    if frozen and run.config.teacher.share_items:
        rows = np.array(frozen["embed"])
    elif stage.name == "model" and not start and run.config.data.vectors:
        vectors, there = word_vectors(run.config.data, run.source)
        rows = np.where(there[:, None], vectors, at(state.params, item_table(stage.task)))
    if rows is not None:
        state = dataclasses.replace(
            state, params=replace_at(state.params, item_table(stage.task), rows)
        )
    return state


def item_table(task: Task) -> tuple[str, ...]:
    """Where a task's item table is; raises ValueError if it has none."""
    if not task.table:
        raise ValueError(
            "this model has no item table: leave config.teacher.share_items and config.data.vectors out"
        )
    return task.table


def fresh_carry(task: Task, params: Params, batch_size: int) -> Any:
    """What is remembered before the first step, on the host."""
    return jax.device_get(jax.jit(task.memory, static_argnums=1)(params, batch_size))


def blank_state(run: Run, stage: Stage) -> TrainState:
    """The shapes and dtypes of a state, as checkpoints have it."""
    task, optimizer = stage.task, stage_optimizer(run, stage)
    like = jax.eval_shape(lambda key: init_state(task, optimizer, key), jax.random.key(0))
    if task.carries:
        carry = jax.eval_shape(lambda params: task.memory(params, stage.batch_size), like.params)
        like = dataclasses.replace(like, carry=carry)
    return like


def check_start(run: Run, stage: Stage) -> None:
    """Raises what `read_start` does, if the model is still to begin with another run's parameters."""
    if run.config.train.start_from and not any((run.workdir / stage.name).glob("[0-9]*")):
        read_start(run, stage)


def read_start(run: Run, stage: Stage) -> Params:
    """See `kept.read_start`."""
    start = paths.resolve(run.config.train.start_from, "config.train.start_from")
    return kept.read_start(start, run.source, stage.task)


def open_checkpoints(run: Run, stage: Stage) -> Checkpoints:
    t = run.config.train
    return Checkpoints(run.workdir / stage.name, keep_last=t.keep_last, keep_best=t.keep_best)


def data_settings(run: Run) -> dict[str, Any]:
    """What training and evaluation batches have in common."""
    d = run.config.data
    return dict(
        seed=run.config.seed,
        segment_length=d.segment_length,
        negatives=d.negatives,
        prefetch=d.prefetch,
        workers=d.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def first_step(run: Run) -> tuple[Stage, Mapped, TrainState, Params, Batch]:
    """What the model's first step takes, on the host; the teacher, if there is one, as it is before its training."""
    stage, teacher = model_stage(run), tasks.make_teacher(run.config, run.source)
    frozen = (
        ()
        if teacher is None
        else jax.device_get(teacher.init(jax.random.key(run.config.seed))["sampler"])
    )
    data = batches(run.source, **data_settings(run), batch_size=stage.batch_size, num_steps=1)
    with contextlib.closing(data):
        return stage, map_stage(run, stage), fresh_state(run, stage), frozen, next(data)
