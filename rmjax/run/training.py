"""Training: the teacher first, then the model with it.

Every stage can stop at any step and go on from its newest intact checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from rmjax.io import paths, text
from rmjax.run import kept, reporting
from rmjax.run.evaluate import test
from rmjax.run.loop import loop
from rmjax.run.mapping import Mapped
from rmjax.run.stages import (
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


def fit(
    config: ConfigDict,
    workdir: str | Path,
    source: Source | None = None,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
) -> list[dict[str, Any]]:
    """Trains a model and tests it; called again, goes on where it stopped.

    Args:
      config: `rmjax.config.base()` with the changes of a card.
      workdir: where checkpoints and logs go.
      source: data in place of those that config.data names. config.data.segment_length and the other keys that every
        source shares hold for them.
      task: what is trained, in place of what config says.
      loggers: objects with `write(kind, step, values, text)`, each of which gets every line of the log: the kind is
        'teacher/train', 'model/valid' and so on, and values are numbers by name. They are left open.

    Returns:
      Rows of the final table, the model's first.

    Raises:
      ValueError: a key of the config is unknown or has an impossible value; or the workdir has a run of another config
        or on other data.
      TypeError: source is no `rmjax.Source`.
      Preempted, Stopped, FloatingPointError: as `train`.
    """
    configs.validate(config)
    if source is not None and not isinstance(source, Source | Texts):
        raise TypeError(f"source is a {type(source).__name__}: make it a subclass of rmjax.Source")
    return train(config, workdir, source, task, loggers)


def train(
    config: Any,
    workdir: str | Path,
    source: Source | None = None,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
) -> list[dict[str, Any]]:
    """Trains what `config` says in `workdir`, or goes on where a run there stopped. -> rows of the final table.

    The config is taken to be valid; other arguments are as of `fit`.

    Raises:
      Preempted: SIGTERM or SIGINT came; the state is saved, the same call goes on.
      Stopped: one of them came while data were prepared; the same call prepares them anew.
      FloatingPointError: a loss is NaN or infinite; names the step and the parts, keeps the last good checkpoint.
    """
    results = paths.resolve_checkpoint(workdir, "--workdir") / "results.json"
    with opened(config, workdir, source, reading=results.exists()) as run:
        run = dataclasses.replace(run, task=task, loggers=loggers)
        if results.exists():
            logging.info("%s is finished; these are its results.", run.workdir)
            return text.read_json(results, "remove it, and the same line makes it anew")
        stage = model_stage(run)
        mapped = map_stage(
            run, stage
        )  # before the teacher's training: what is wrong with it is said at once
        check_start(run, stage)
        frozen = train_teacher(run)
        params = train_stage(run, stage, mapped, frozen)
        rows = test(run, stage.task, mapped, params)
        kept.write_whole(results, json.dumps(rows, indent=1))
        return rows


def evaluate_only(
    config: Any, workdir: str | Path, source: Source | None = None, task: Task | None = None
) -> list[dict[str, Any]]:
    """Tests the best checkpoint that `workdir` holds, training nothing. -> rows of the final table."""
    with opened(config, workdir, source, reading=True) as run:
        run = dataclasses.replace(run, task=task)
        stage = model_stage(run)
        mapped = map_stage(run, stage)
        return test(run, stage.task, mapped, kept.read_model(run.workdir, stage.task))


def trained(workdir: str | Path) -> tuple[Any, Params, Source]:
    """What a run has learned, for notebooks: its task, the best parameters so far, its data. Changes nothing there.

    `rmjax.open_model` needs no data.
    """
    folder = paths.resolve_checkpoint(workdir, "workdir")
    config, _ = kept.read_config(folder)
    source = make_source(config.data, config.data.seed)
    kept.refuse_other_items(folder, source)
    task = tasks.make_task(config, source)
    return task, jax.device_put(kept.read_model(folder, task)), source


@contextlib.contextmanager
def opened(
    config: Any, workdir: str | Path, source: Source | None = None, *, reading: bool = False
) -> Iterator[Run]:
    """Locks the workdir, compares the config with the one that began there, and opens the data.

    Args:
      source: the data; None: those that config.data names.
      reading: the run has a model already. The folder may be read-only; what is written is data.json, if it is missing.
    """
    folder = paths.resolve_checkpoint(workdir, "--workdir")
    alone = (
        lock(folder, reading=reading) if jax.process_index() == 0 else contextlib.nullcontext()
    )  # speaks for all
    with alone, Preemption() as stop:
        if source is None:
            source = make_source(config.data, config.data.seed)
        if not reading or any((folder / "model").glob("[0-9]*")):
            kept.check_same_config(config, folder, source)
        yield Run(config, folder, source, stop)


def train_teacher(run: Run) -> Params:
    """Stage 1 (RM section 3.3.2): the history sampler, trained on its own, then frozen. () if none is needed."""
    task = tasks.make_teacher(run.config, run.source)
    if task is None:
        return ()
    t = run.config.teacher
    if t.dir:
        return kept.read_teacher(paths.resolve(t.dir, "config.teacher.dir"), run.source, task)
    stage = Stage("teacher", task, t.steps, t.batch_size, t.learning_rate)
    return train_stage(run, stage, map_stage(run, stage), ())["sampler"]


def train_stage(run: Run, stage: Stage, mapped: Mapped, frozen: Params) -> Params:
    """Trains a stage to its last step, from wherever it stands. -> parameters of its best step, on the host."""
    with contextlib.closing(open_checkpoints(run, stage)) as checkpoints:
        start, state = checkpoints.restore(blank_state(run, stage)) or (
            0,
            fresh_state(run, stage, frozen),
        )
        if start:
            logging.info("%s: going on from step %d of %d.", stage.name, start, stage.steps)
        if start < stage.steps or checkpoints.score(stage.steps) is None:
            evaluated = checkpoints.score(start) is not None
            writer = reporting.open_loggers(
                run.config, run.workdir, stage.name, start, evaluated, run.loggers
            )
            with contextlib.closing(writer):
                loop(Training(run, stage, mapped, checkpoints, writer), start, state, frozen)
        checkpoints.wait()
        best = kept.restore_best(checkpoints, state.params)
        assert best is not None
        return best
