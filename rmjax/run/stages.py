"""A stage of training: its task over the devices, and the state that it begins with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
from ml_collections import ConfigDict

from rmjax import schedules, tasks
from rmjax.data.pipeline import batches
from rmjax.data.stories.vectors import word_vectors
from rmjax.io import paths
from rmjax.io.checkpoint import Checkpoints
from rmjax.io.progress import Stopped
from rmjax.run import environment, parameters
from rmjax.run.mapping import Mapped, make_mapped
from rmjax.run.optimizer import make_optimizer
from rmjax.run.reporting import MetricWriter
from rmjax.run.step import Carry, Pieces, TrainState, init_state
from rmjax.run.workdir import Preemption
from rmjax.tasks import sequences
from rmjax.types import Batch, Logger, Params, Task, at, replace_at

CPU_ITEMS = 8192  # items of the streams that a CPU holds at once, see `microbatch`
POLL_SECONDS = 10  # processes poll at least this often, if a step is not longer: `Run.stopping`


class Preempted(Stopped):
    """The run was asked to stop, and its complete state is saved."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training, the teacher's or the model's."""

    name: str  # 'teacher' or 'model'
    task: Task
    steps: int
    batch_size: int
    learning_rate: float

    @property
    def section(self) -> str:
        """The section of the config with the settings of the stage."""
        return "teacher" if self.name == "teacher" else "train"


@dataclasses.dataclass
class Poll:
    """When the processes last asked each other whether to stop, and the step of the next poll."""

    step: int = 0
    next_step: int = 0
    time: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass
class Clock:
    """What a run waits for before its first step."""

    begin: float = dataclasses.field(default_factory=time.monotonic)  # before the data are opened
    opening: float = 0.0  # seconds until the data were open
    compiling: float = 0.0  # seconds of all compilations so far
    steps: int = 0  # that this process has taken


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages share."""

    config: ConfigDict
    workdir: Path
    source: Any  # a Source, or Texts
    stop: Preemption
    poll: Poll = dataclasses.field(default_factory=Poll)
    clock: Clock = dataclasses.field(default_factory=Clock)
    task: Task | None = None  # the caller's, in place of the one that config describes
    loggers: Sequence[Logger] = ()  # the caller's, see `fit`

    def stopping(self, step: int = 0) -> bool:
        """Whether to save and leave.

        All processes must leave at the same step, so they ask each other. This holds up the
        devices, so it happens every `train.log_every` steps, or every ten seconds if these steps
        take longer.

        Args:
          step: the steps that the stage has taken; 0 in an evaluation, which always asks.

        Returns:
          The same answer on every process.
        """
        if jax.process_count() == 1:
            return self.stop.requested
        last, moment = self.poll, time.monotonic()
        if last.step < step < last.next_step:
            return False
        pace = (moment - last.time) / max(1, step - last.step)
        requested, pace = np.max(
            multihost_utils.process_allgather(np.array([self.stop.requested, pace])), 0
        )
        last.step, last.time = step, moment
        # `pace` is the slowest process's, so the next step is the same on all of them.
        steps = np.clip(POLL_SECONDS / max(pace, 1e-6), 1, self.config.train.log_every)
        last.next_step = step + int(steps)
        return bool(requested)


class Training(NamedTuple):
    """A stage in progress: what its loop works with, and where it writes."""

    run: Run
    stage: Stage
    mapped: Mapped
    checkpoints: Checkpoints
    writer: MetricWriter


def model_stage(run: Run) -> Stage:
    """The stage that trains the model."""
    t = run.config.train
    task = tasks.make_task(run.config, run.source) if run.task is None else run.task
    return Stage("model", task, t.steps, t.batch_size, t.learning_rate)


def stage_optimizer(run: Run, stage: Stage) -> optax.GradientTransformation:
    """The optimizer of a stage, with its schedule and warm-up."""
    t = run.config.train
    warmup = round(t.warmup * stage.steps)
    schedule = schedules.build(t.schedule, max(1, stage.steps - warmup), run.config)
    return make_optimizer(stage.learning_rate, t.clip, schedule, warmup)


def map_stage(run: Run, stage: Stage, cut: bool = True) -> Mapped:
    """Maps the steps of a stage over the devices.

    Args:
      run: the run.
      stage: the stage.
      cut: False: a CPU holds all rows of a batch at once, as accelerators do, unless
        `train.microbatch` is set.

    Returns:
      The mapped steps, which log their compilation.

    Raises:
      ValueError: batches do not divide among the devices.
    """
    t, optimizer = run.config.train, stage_optimizer(run, stage)
    devices = max(1, (t.devices or jax.device_count()) // t.model_devices)
    for name, size in (
        (f"{stage.section}.batch_size", stage.batch_size),
        ("train.eval_batch_size", t.eval_batch_size),
    ):
        if size % devices:
            raise ValueError(
                f"config.{name} = {size} does not divide among {devices} devices: change it, or "
                "config.train.devices"
            )
    at_once = stage.name == "teacher" or not (cut or t.microbatch)
    mapped = make_mapped(
        stage.task,
        optimizer,
        run.config.seed,
        mapping=t.mapping,
        devices=t.devices,
        model_devices=t.model_devices,
        microbatch=None if at_once else microbatch(run, stage.batch_size // devices),
        sparse_items=t.sparse_items,
        split_layers=t.split_layers,
    )
    precise = functools.partial(in_precision, compute_dtype=t.compute_dtype)
    say = lambda step, what: announced(
        precise(step), f"{stage.name}: compiling the {what}", run.clock
    )
    return mapped._replace(
        train_step=say(mapped.train_step, "train step"),
        scores=say(mapped.scores, "evaluation step"),
        measure=say(mapped.measure, "evaluation step"),
        rehearsals=say(mapped.rehearsals, "memory gain"),
        compiled=precise(mapped.compiled),
    )


def in_precision(step: Callable[..., Any], compute_dtype: str) -> Callable[..., Any]:
    """Makes a step multiply as config.train.compute_dtype says.

    By default JAX multiplies float32 arrays in TF32 on a GPU. A CPU has no such choice. A TPU keeps
    JAX's default, products in bfloat16.

    Args:
      step: is traced when it is called.
      compute_dtype: the value of the key.

    Returns:
      The step.
    """
    if jax.default_backend() != "gpu":
        return step
    precision = "float32" if compute_dtype == "float32" else "tensorfloat32"

    @functools.wraps(step)
    def wrapped(*args: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return step(*args)

    return wrapped


def announced(step: Callable[..., Any], doing: str, clock: Clock) -> Callable[..., Any]:
    """Makes a step log its compilations and the seconds they take.

    Args:
      step: compiles whenever its last argument, a batch, has new shapes.
      doing: the log line.
      clock: counts the seconds, too.

    Returns:
      A function with the arguments and results of `step`.
    """
    seen: set[tuple] = set()

    def call(*args: Any) -> Any:
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(args[-1]))
        if shapes in seen:
            return step(*args)
        logging.info("%s ...", doing)
        begin = time.monotonic()
        result = step(*args)
        seen.add(shapes)
        took = time.monotonic() - begin
        clock.compiling += took
        logging.info("%s: done in %.1f seconds.", doing, took)
        return result

    return call


def microbatch(run: Run, rows: int) -> Pieces | None:
    """How many rows of a batch a device holds at once.

    A CPU holds a few. Activations far larger than its caches, and memory that is mapped anew in
    every step, cost more than the pieces do. Other devices hold all rows: a piece is a scan of
    small kernels, and every kernel has to be launched.

    Args:
      run: the run; `train.microbatch` has a number, or 0 to choose one.
      rows: the rows of a device.

    Returns:
      See `make_train_step`; None: all rows.

    Raises:
      ValueError: `train.microbatch` does not divide the rows.
    """
    asked = run.config.train.microbatch
    if rows % (asked or 1):
        raise ValueError(
            f"config.train.microbatch = {asked} does not divide the {rows} streams of a device: "
            "change it, or set 0"
        )
    if asked:
        return lambda rows, items: asked
    if jax.devices()[0].platform != "cpu":
        return None

    def pieces(rows: int, items: int) -> int:
        # Fewer than 4 rows are slow at any length: the matrix products of the scan become thin.
        best = max(4, CPU_ITEMS / items)
        divisors = (m for m in range(1, rows + 1) if rows % m == 0)
        return min(divisors, key=lambda m: abs(math.log(m / best)))

    return pieces


def fresh_state(run: Run, stage: Stage, frozen: Params = ()) -> TrainState:
    """The state at step 0.

    It is a function of the seed, and of what config takes from elsewhere. That may be the
    parameters of another run or of a released checkpoint, the teacher's item table, or word
    vectors.

    Args:
      run: the run.
      stage: the stage.
      frozen: the teacher's parameters; () if none is needed.

    Returns:
      Host arrays.

    Raises:
      ValueError, FileNotFoundError: as `read_start` and `item_table`, or as the readers of word
        vectors and released checkpoints.
    """
    optimizer = stage_optimizer(run, stage)
    draw = jax.jit(lambda key: init_state(stage.task, optimizer, key))
    begin = time.monotonic()
    state = environment.on_host(draw, jax.random.key(run.config.seed))
    run.clock.compiling += time.monotonic() - begin
    if stage.task.carries:
        carry = fresh_carry(stage.task, state.params, stage.batch_size)
        state = dataclasses.replace(state, carry=carry)
    start = stage.name == "model" and run.config.train.start_from
    if start:
        state = dataclasses.replace(state, params=read_start(run, stage, state.params))
    elif tasks.is_sequence(run.config) and run.config.model.pretrained:
        state = dataclasses.replace(state, params=sequences.pretrained(run.config, state.params))
    rows: np.ndarray | None = None
    if frozen and run.config.teacher.share_items:
        rows = np.array(frozen["embed"])
    elif stage.name == "model" and not start and run.config.data.vectors:
        vectors, known = word_vectors(run.config.data, run.source)
        rows = np.where(known[:, None], vectors, at(state.params, item_table(stage.task)))
    if rows is None:
        return state
    params = replace_at(state.params, item_table(stage.task), rows)
    return dataclasses.replace(state, params=params)


def item_table(task: Task) -> tuple[str, ...]:
    """The path of a task's item table.

    Args:
      task: the task.

    Returns:
      See `Task.table`.

    Raises:
      ValueError: the task has no item table.
    """
    if not task.table:
        raise ValueError(
            "this model has no item table: leave out config.teacher.share_items and "
            "config.data.vectors"
        )
    return task.table


def fresh_carry(task: Task, params: Params, batch_size: int) -> Carry:
    """The carry before the first step.

    Args:
      task: a task that carries.
      params: of the task.
      batch_size: B.

    Returns:
      Host arrays with leading axis B.
    """
    return environment.on_host(jax.jit(task.memory, static_argnums=1), params, batch_size)


def blank_state(run: Run, stage: Stage) -> TrainState:
    """The shapes and dtypes of a stage's state, as its checkpoints have it."""
    task, optimizer = stage.task, stage_optimizer(run, stage)
    like = jax.eval_shape(lambda key: init_state(task, optimizer, key), jax.random.key(0))
    if task.carries:
        carry = jax.eval_shape(lambda params: task.memory(params, stage.batch_size), like.params)
        like = dataclasses.replace(like, carry=carry)
    return like


def check_start(run: Run, stage: Stage) -> None:
    """Checks that the other run with whose parameters a stage will begin can be read.

    Args:
      run: the run.
      stage: the stage.

    Raises:
      FileNotFoundError, ValueError: as `parameters.read_start`. Not if the stage has checkpoints.
    """
    if run.config.train.start_from and not any((run.workdir / stage.name).glob("[0-9]*")):
        start = paths.resolve(run.config.train.start_from, "config.train.start_from")
        parameters.check_start(start, run.source, stage.task, run.config.train.new_items)


def read_start(run: Run, stage: Stage, fresh: Params) -> Params:
    """Reads the parameters at `train.start_from`, see `parameters.read_start`."""
    start = paths.resolve(run.config.train.start_from, "config.train.start_from")
    new_items = run.config.train.new_items
    return parameters.read_start(start, run.source, stage.task, new_items, fresh)


def open_checkpoints(run: Run, stage: Stage) -> Checkpoints:
    """Opens the checkpoints of a stage. The caller closes them."""
    t = run.config.train
    return Checkpoints(run.workdir / stage.name, keep_last=t.keep_last, keep_best=t.keep_best)


def data_settings(run: Run) -> dict[str, Any]:
    """The arguments that training and evaluation batches have in common, see `pipeline.batches`."""
    d = run.config.data
    return dict(
        seed=run.config.seed,
        segment_length=d.segment_length,
        negatives=d.negatives,
        shapes=d.shapes,
        prefetch=d.prefetch,
        workers=d.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def first_step(run: Run) -> tuple[Stage, Mapped, TrainState, Params, Batch]:
    """The arguments of the model's first step.

    Args:
      run: the run.

    Returns:
      The stage and its mapped steps; on the host the state, the teacher's parameters before its
      training (() if none is needed), and the batch.

    Raises:
      ValueError, FileNotFoundError: as `map_stage` and `fresh_state`.
    """
    stage, teacher = model_stage(run), tasks.make_teacher(run.config, run.source)
    frozen: Params = ()
    if teacher is not None:
        drawn = environment.on_host(jax.jit(teacher.init), jax.random.key(run.config.seed))
        frozen = drawn["sampler"]
    data = batches(run.source, **data_settings(run), batch_size=stage.batch_size, num_steps=1)
    with contextlib.closing(data):
        return stage, map_stage(run, stage), fresh_state(run, stage), frozen, next(data)
