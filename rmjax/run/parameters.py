"""Parameters that a run saved, for evaluation, for another run, and for use from Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import logging

from rmjax.data.source import Source
from rmjax.io.checkpoint import Checkpoints
from rmjax.run.items import match_items, mean_of_neighbours, move_rows
from rmjax.run.kept import read_config
from rmjax.types import Params, Task, at, replace_at

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


def read_start(
    workdir: Path,
    source: Source | Texts,
    task: Task,
    new_items: str = "refuse",
    fresh: Params | None = None,
) -> Params:
    """Reads the best parameters of another run, with which this run begins.

    Args:
      workdir: of the other run.
      source: the data of this run.
      task: the task of this run.
      new_items: see `config.train.new_items`.
      fresh: drawn parameters of the task, for the rows of new items; None: those are zeros.

    Returns:
      The parameters, with the rows of items in the order of `source`.

    Raises:
      FileNotFoundError: nothing was trained in the workdir.
      ValueError: the run was trained on other data (as `match_items`), or has other parameters.
    """
    params, rows, name = _best_of(workdir, source, task, new_items, restore_best)
    params = _moved(params, task, rows, name, fresh)
    if rows is None or new_items != "mean" or not (rows < 0).any():
        return params
    assert isinstance(source, Source)  # texts have no ids from outside
    pairs = source.neighbours(rows < 0)
    beside = len(np.unique(pairs[0]))
    text = "%s: %d of %d new items begin at the mean of their neighbours, the others at random."
    logging.info(text, name, beside, (rows < 0).sum())
    for path in task.item_arrays:
        table = mean_of_neighbours(at(params, path), pairs, rows < 0)
        params = replace_at(params, path, table)
    return params


def check_start(
    workdir: Path, source: Source | Texts, task: Task, new_items: str = "refuse"
) -> None:
    """Checks that `read_start` can read the run, from ids and shapes alone.

    Args:
      workdir: as in `read_start`.
      source: as in `read_start`.
      task: as in `read_start`.
      new_items: as in `read_start`.

    Raises:
      FileNotFoundError, ValueError: as `read_start`.
    """
    fits = lambda saved, like: saved.fits({"params": like}, best=True, part=True) or None
    _best_of(workdir, source, task, new_items, fits)


def _best_of(
    workdir: Path,
    source: Source | Texts,
    task: Task,
    new_items: str,
    read: Callable[[Checkpoints, Params], Any],
) -> tuple[Any, np.ndarray | None, str]:
    """Reads the best checkpoint for `read_start`: what `read` returns, the rows, and a name."""
    name = f"config.train.start_from = {str(workdir)!r}"
    rows = match_items(workdir, source, name, new_items)
    try:
        like = jax.eval_shape(task.init, jax.random.key(0))
        if rows is not None:
            like = _resized(like, task, read_config(workdir)[1]["items"])
        with contextlib.closing(Checkpoints(workdir / "model", read_only=True)) as checkpoints:
            best = read(checkpoints, like)
    except ValueError as error:
        cure = "give both runs the same machine, reason and rehearsal"
        raise ValueError(
            f"{name} has other parameters than this config's: {cure} ({error})"
        ) from error
    if best is None:
        raise FileNotFoundError(
            f"{name} has no checkpoint of the model: name a workdir that was trained"
        )
    return best, rows, name


def _resized(like: Params, task: Task, items: int) -> Params:
    """The shapes of the parameters with another number of items."""
    for path in task.item_arrays:
        leaf = at(like, path)
        shape = jax.ShapeDtypeStruct((items, *leaf.shape[1:]), leaf.dtype)
        like = replace_at(like, path, shape)
    return like


def _moved(
    params: Params, task: Task, rows: np.ndarray | None, name: str, fresh: Params | None = None
) -> Params:
    """The parameters with the rows of all items in the order of this run."""
    if rows is None:
        return params
    moved = int(((rows != np.arange(len(rows))) & (rows >= 0)).sum())
    logging.info("%s: %d of %d rows move, each to the place of its id.", name, moved, len(rows))
    for path in task.item_arrays:
        old = at(params, path)
        blank = np.zeros((len(rows), *old.shape[1:]), old.dtype)
        drawn = blank if fresh is None else np.asarray(at(fresh, path))
        params = replace_at(params, path, move_rows(old, rows, drawn))
    return params


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
