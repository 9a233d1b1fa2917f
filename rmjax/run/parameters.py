"""Parameters that a run saved, for evaluation, for another run, and for use from Python."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import logging

from rmjax.data.source import Source
from rmjax.io.checkpoint import Checkpoints
from rmjax.run.items import match_items, move_rows
from rmjax.types import Params, Task

if TYPE_CHECKING:
    from rmjax.data.texts.streams import Texts


def read_model(workdir: str | Path, task: Task) -> Params:
    """Reads the best parameters of a run's model.

    Args:
      workdir: of the run.
      task: the task that it was trained on.

    Returns:
      Host arrays.

    Raises:
      FileNotFoundError: the model has no checkpoint, or no intact one.
      ValueError: the parameters do not fit the task.
    """
    params = read_best(Path(workdir) / "model", jax.eval_shape(task.init, jax.random.key(0)))
    if params is None:
        if any((Path(workdir) / "model").glob("[0-9]*")):
            cure = "restore it from a copy, or train in another --workdir"
            raise FileNotFoundError(
                f"{workdir} has no intact checkpoint of the model, see above: {cure}"
            )
        raise FileNotFoundError(
            f"{workdir} has no checkpoint of the model: train first, with --mode=train"
        )
    return params


def read_teacher(workdir: Path, source: Source | Texts, task: Task) -> Params:
    """Reads the best teacher of another run, which must have finished the teacher's training.

    Args:
      workdir: of the other run.
      source: the data of this run.
      task: the teacher's task.

    Returns:
      The parameters of the sampler, with the rows of items in the order of `source`.

    Raises:
      FileNotFoundError: the workdir has no finished teacher.
      ValueError: as `match_items`.
    """
    name = f"config.teacher.dir = {str(workdir)!r}"
    rows = match_items(workdir, source, name)
    ended = any((workdir / "model").glob("[0-9]*"))  # the model's training follows the teacher's
    like = {"sampler": jax.eval_shape(task.init, jax.random.key(0))["sampler"]}
    params = read_best(workdir / "teacher", like) if ended else None
    if params is None:
        raise FileNotFoundError(f"{name} holds no finished teacher: name a workdir with one")
    return _moved(params, task, rows, name)["sampler"]


def read_start(workdir: Path, source: Source | Texts, task: Task) -> Params:
    """Reads the best parameters of another run, with which this run begins.

    Args:
      workdir: of the other run.
      source: the data of this run.
      task: the task of this run.

    Returns:
      The parameters, with the rows of items in the order of `source`.

    Raises:
      FileNotFoundError: nothing was trained in the workdir.
      ValueError: the run was trained on other data (as `match_items`), or has other parameters.
    """
    name = f"config.train.start_from = {str(workdir)!r}"
    rows = match_items(workdir, source, name)
    try:
        params = read_best(workdir / "model", jax.eval_shape(task.init, jax.random.key(0)))
    except ValueError as error:
        cure = "give both runs the same machine, reason and rehearsal"
        raise ValueError(
            f"{name} has other parameters than this config's: {cure} ({error})"
        ) from error
    if params is None:
        raise FileNotFoundError(
            f"{name} has no checkpoint of the model: name a workdir that was trained"
        )
    return _moved(params, task, rows, name)


def _moved(params: Params, task: Task, rows: np.ndarray | None, name: str) -> Params:
    """The parameters with the rows of the item table in the order of this run."""
    if rows is None:
        return params
    assert task.table is not None
    moved = int((rows != np.arange(len(rows))).sum())
    logging.info("%s: %d of %d rows move, each to the place of its id.", name, moved, len(rows))
    return move_rows(params, task.table, rows)


def read_best(folder: Path, like: Params) -> Params | None:
    """Reads the best parameters that a stage saved. Nothing in the folder changes.

    Args:
      folder: of the stage's checkpoints.
      like: the structure, shapes and dtypes of the parameters, or of a part of them.

    Returns:
      Host arrays; None if no checkpoint is intact.

    Raises:
      ValueError: an intact checkpoint does not fit `like`.
    """
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        return restore_best(checkpoints, like)


def restore_best(checkpoints: Checkpoints, like: Params) -> Params | None:
    """Restores the parameters of the best checkpoint.

    A damaged one is replaced by one before it, or else by the newest intact one.

    Args:
      checkpoints: of a stage.
      like: as in `read_best`.

    Returns:
      As `read_best`.

    Raises:
      ValueError: as `read_best`.
    """
    restored = checkpoints.restore({"params": like}, best=True, part=True)
    return None if restored is None else restored[1]["params"]
