"""Training: first the teacher, then the model.

Every stage can stop at any step, and continues from its newest intact checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from rmjax import config as configs
from rmjax import tasks
from rmjax.data import make_source
from rmjax.data.source import Source
from rmjax.data.texts.streams import Texts
from rmjax.evaluation import scoring
from rmjax.io import paths, text
from rmjax.registry import SOURCES
from rmjax.run import kept, parameters, report, reporting
from rmjax.run.evaluate import named, test
from rmjax.run.items import refuse_other_items
from rmjax.run.loop import run_loop
from rmjax.run.mapping import Mapped
from rmjax.run.resume import check_same_config
from rmjax.run.stages import (
    Clock,
    Run,
    Stage,
    Training,
    blank_state,
    check_start,
    fresh_state,
    map_stage,
    model_stage,
    open_checkpoints,
)
from rmjax.run.workdir import Preemption, lock
from rmjax.types import Logger, Params, Task

Rows = list[dict[str, Any]]  # the final table, the model's row first


def fit(
    config: ConfigDict,
    workdir: str | Path,
    source: Source | Texts | None = None,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
) -> Rows:
    """Trains a model and tests it. If it stopped, the same call continues.

    Args:
      config: `rmjax.config.base()` with the changes of a card.
      workdir: where checkpoints and logs go.
      source: data in place of those that `config.data` names. The keys that all sources share,
        such as `config.data.segment_length`, hold for them too.
      task: what is trained, in place of what config describes.
      loggers: objects with `write(kind, step, values)`. They get the numbers of every step that is
        logged: the kind is 'teacher/train', 'model/valid' and so on. `fit` does not close them.

    Returns:
      Rows of the final table, the model's first.

    Raises:
      ValueError: a key of the config is unknown or has an impossible value; or the workdir has a
        run of another config or on other data.
      TypeError: `source` is no `rmjax.Source`, or `task` is no `rmjax.Task`.
      Preempted, Stopped, FloatingPointError: as `train`.
    """
    configs.validate(config)
    if source is not None and not isinstance(source, Source | Texts):
        raise TypeError(f"source is a {type(source).__name__}: make it a subclass of rmjax.Source")
    if isinstance(source, Texts) and SOURCES.task_of(config.data.name) != "every token":
        raise ValueError(
            f"source is a text, but config.data.name = {config.data.name!r}: take 'books'"
        )
    if task is not None and Task not in type(task).__mro__:
        raise TypeError(f"task is a {type(task).__name__}: make it a subclass of rmjax.Task")
    return train(config, workdir, source, task, loggers)


def train(
    config: ConfigDict,
    workdir: str | Path,
    source: Source | Texts | None = None,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
) -> Rows:
    """Trains and tests as `fit`, without checks of the config and the source.

    Args:
      config: a valid config.
      workdir: as in `fit`.
      source: as in `fit`.
      task: as in `fit`.
      loggers: as in `fit`.

    Returns:
      Rows of the final table, the model's first.

    Raises:
      ValueError: the workdir has a run of another config or on other data.
      Preempted: SIGTERM or SIGINT came. The state is saved, and the same call continues.
      Stopped: one of them came while data were prepared. The same call prepares them anew.
      FloatingPointError: a loss is NaN or infinite; names the step and the terms. The last good
        checkpoint is kept.
    """
    results = paths.resolve_checkpoint(workdir, "--workdir") / "results.json"
    with opened(config, workdir, source, reading=results.exists()) as run:
        run = dataclasses.replace(run, task=task, loggers=loggers)
        if results.exists():
            logging.info("%s is finished; these are its results.", run.workdir)
            return text.read_json(results, "remove it, and the same line makes it anew")
        # The model is mapped before the teacher's training, so its errors come at once.
        stage = model_stage(run)
        mapped = map_stage(run, stage)
        check_start(run, stage)
        frozen = train_teacher(run)
        params = train_stage(run, stage, mapped, frozen)
        rows, histories = test(run, stage.task, mapped, params)
        kept.write_whole(results, json.dumps(rows, indent=1))
        if jax.process_index() == 0:
            tables = {"Test": named(rows), "By length of history": histories}
            report.write(run.workdir, {title: rows for title, rows in tables.items() if rows})
        return rows


def evaluate_only(
    config: ConfigDict,
    workdir: str | Path,
    source: Source | Texts | None = None,
    task: Task | None = None,
) -> Rows:
    """Tests the best checkpoint of a run, without training.

    Args:
      config: of the run.
      workdir: of the run.
      source: as in `fit`.
      task: as in `fit`.

    Returns:
      Rows of the final table, the model's first.

    Raises:
      FileNotFoundError: the model has no intact checkpoint.
      ValueError: the workdir has a run of another config or on other data.
    """
    with opened(config, workdir, source, reading=True) as run:
        run = dataclasses.replace(run, task=task)
        stage = model_stage(run)
        mapped = map_stage(run, stage)
        params = parameters.read_model(run.workdir, stage.task)
        return test(run, stage.task, mapped, params)[0]


def trained(workdir: str | Path) -> tuple[Task, Params, Source]:
    """Opens a trained model with its data, for notebooks. Nothing in the workdir changes.

    `rmjax.open_model` needs no data.

    Args:
      workdir: of the run, which may still be training.

    Returns:
      The task, its best parameters so far, and the data.

    Raises:
      FileNotFoundError: nothing was trained in the workdir.
      ValueError: the data are not those of the run.
    """
    folder = paths.resolve_checkpoint(workdir, "workdir")
    config, _ = kept.read_config(folder)
    source = make_source(config.data, config.data.seed)
    refuse_other_items(folder, source)
    task = tasks.make_task(config, source)
    return task, jax.device_put(parameters.read_model(folder, task)), source


@contextlib.contextmanager
def opened(
    config: ConfigDict,
    workdir: str | Path,
    source: Source | Texts | None = None,
    *,
    reading: bool = False,
) -> Iterator[Run]:
    """Locks a workdir, compares the config with that of its run, and opens the data.

    Args:
      config: of the run.
      workdir: of the run.
      source: the data; None: those that `config.data` names.
      reading: the run has a model already. The folder may be read-only; only a missing data.json is
        written.

    Yields:
      The run.

    Raises:
      RuntimeError: another process holds the workdir.
      OSError: nothing can be written in the workdir, and `reading` is False.
      ValueError: the workdir has a run of another config or on other data.
    """
    folder = paths.resolve_checkpoint(workdir, "--workdir")
    first = jax.process_index() == 0  # holds the lock for all processes
    held = lock(folder, reading=reading) if first else contextlib.nullcontext()
    with held, Preemption() as stop:
        clock = Clock()
        if source is None:
            source = make_source(config.data, config.data.seed)
        clock.opening = time.monotonic() - clock.begin
        if config.train.metric and isinstance(source, Source):
            scoring.check_metric(source, config.train.metric)
        if not reading or any((folder / "model").glob("[0-9]*")):
            check_same_config(config, folder, source)
        yield Run(config, folder, source, stop, clock=clock)


def train_teacher(run: Run) -> Params:
    """Stage 1 (RM section 3.3.2): trains the history sampler on its own. It is frozen afterwards.

    Args:
      run: the run.

    Returns:
      The sampler's parameters on the host, or those of another run's teacher if `teacher.dir` is
      set; () if none is needed.

    Raises:
      FileNotFoundError, ValueError: as `parameters.read_teacher`.
      Preempted, FloatingPointError: as `train`.
    """
    task = tasks.make_teacher(run.config, run.source)
    if task is None:
        return ()
    t = run.config.teacher
    if t.dir:
        other = paths.resolve(t.dir, "config.teacher.dir")
        return parameters.read_teacher(other, run.source, task)
    stage = Stage("teacher", task, t.steps, t.batch_size, t.learning_rate)
    return train_stage(run, stage, map_stage(run, stage), ())["sampler"]


def train_stage(run: Run, stage: Stage, mapped: Mapped, frozen: Params) -> Params:
    """Trains a stage to its last step, from its newest intact checkpoint.

    Args:
      run: the run.
      stage: the stage.
      mapped: its mapped steps.
      frozen: the teacher's parameters, on the host.

    Returns:
      The parameters of its best step, on the host.

    Raises:
      Preempted, FloatingPointError: as `train`.
    """
    with contextlib.closing(open_checkpoints(run, stage)) as checkpoints:
        restored = checkpoints.restore(blank_state(run, stage))
        start, state = restored or (0, fresh_state(run, stage, frozen))
        if start:
            logging.info("%s: going on from step %d of %d.", stage.name, start, stage.steps)
        if start < stage.steps or checkpoints.score(stage.steps) is None:
            evaluated = checkpoints.score(start) is not None
            writer = reporting.open_loggers(
                run.config, run.workdir, stage.name, start, evaluated, run.loggers
            )
            with contextlib.closing(writer):
                training = Training(run, stage, mapped, checkpoints, writer)
                run_loop(training, start, state, frozen)
        checkpoints.wait()
        best = parameters.restore_best(checkpoints, state.params)
        assert best is not None
        return best
