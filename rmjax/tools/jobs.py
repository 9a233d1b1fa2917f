"""The runs of a table: their folders and flags, and their processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import re
import subprocess
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from rmjax.run.workdir import Preemption
from rmjax.tools.tables import Table

T = TypeVar("T")


class Job(NamedTuple):
    """One run.

    Attributes:
      setting: name of the setting, '' for a table without settings.
      row: name of the row.
      seed: seed of the run.
      workdir: folder of the run.
      flags: flags of rmjax.main that change the config.
      needs: folders of runs that must have ended, since this one reads what they trained.
    """

    setting: str
    row: str
    seed: int
    workdir: Path
    flags: list[str]
    needs: tuple[Path, ...] = ()


def jobs(table: Table, workdir: Path, seeds: int) -> list[Job]:
    """Lists every run in order: seed by seed, so that a table that is cut short has every row.

    The runs that rows begin with come first in each seed.

    Args:
      table: the table. If the rows share a teacher, they use the one of the first row.
      workdir: folder of all runs.
      seeds: number of seeds.

    Returns:
      The runs.

    Raises:
      ValueError: two rows or two settings would have one folder, or a name gives none.
    """
    _check_names("row", table.rows)
    _check_names("setting", [name for name in table.settings if name])  # '' is no folder
    _check_names("start", table.starts)
    made = []
    for seed in range(seeds):
        starts = {name: workdir / f"seed{seed}" / "starts" / slug(name) for name in table.starts}
        for name, changes in table.starts.items():
            flags = [f"--config.{key}={value}" for key, value in {**changes, "seed": seed}.items()]
            made.append(Job("", name, seed, starts[name], flags))
        latest: dict[str, Path] = {}  # of each row, if the settings build on one another
        for setting, common in table.settings.items():
            first: Path | None = None
            for name, row in table.rows.items():
                folder = workdir / f"seed{seed}" / slug(setting) / slug(name)
                values = {**common, **row.changes, "seed": seed}
                needs: list[Path] = []
                if table.share_teacher and first:
                    values["teacher.dir"] = str(first)
                    needs.append(first)
                first = first or folder
                if begin := latest.get(name) or starts.get(row.start):
                    values["train.start_from"] = str(begin)
                    needs.append(begin)
                if table.onward:
                    latest[name] = folder
                flags = [f"--config.{key}={value}" for key, value in values.items()]
                made.append(Job(setting, name, seed, folder, flags, tuple(needs)))
    return made


def _check_names(what: str, names: Iterable[str]) -> None:
    """Raises ValueError unless each name gives a folder of its own."""
    taken: dict[str, str] = {}
    for name in names:
        folder = slug(name)
        if not folder:
            raise ValueError(
                f"the {what} {name!r} has no letter or digit for its folder: rename it"
            )
        if folder in taken:
            raise ValueError(
                f"the {what}s {taken[folder]!r} and {name!r} have no folder of their own, since "
                f"both give {folder!r}: rename one"
            )
        taken[folder] = name


def slug(name: str) -> str:
    """Turns a name into one for a folder: 'CM (Full)' gives 'cm-full'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def in_order(
    todo: Sequence[Job],
    call: Callable[[Job], T],
    at_once: int,
    give_up: Callable[[], None] = lambda: None,
) -> Generator[tuple[Job, T]]:
    """Calls a function for jobs, some at a time, each of these on processor cores of its own.

    A process that `call` starts stays on the cores of its job. A job begins when those that it
    needs have ended; meanwhile later jobs may begin.

    Args:
      todo: the jobs; those that others need come first.
      call: the function, which is called in threads.
      at_once: number of jobs at a time; 1 leaves all cores to it.
      give_up: is called after an error, here or in the caller, so that running calls can end early.

    Yields:
      (job, what the function returned), in the order of `todo`.

    Raises:
      ValueError: there are fewer cores than jobs at a time.
      BaseException: what a call raised. Jobs that have not begun are then left out.
    """
    waiting, folders = list(todo), {job.workdir for job in todo}
    running: dict[Future[T], Job] = {}
    ended: dict[Path, T] = {}
    with ThreadPoolExecutor(at_once, initializer=_take_cores(at_once)) as pool:
        try:
            for job in todo:
                while job.workdir not in ended:
                    ready = (j for j in waiting if folders & {*j.needs} <= ended.keys())
                    for other in list(itertools.islice(ready, at_once - len(running))):
                        waiting.remove(other)
                        running[pool.submit(call, other)] = other
                    for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                        ended[running.pop(future).workdir] = future.result()
                yield job, ended[job.workdir]
        except BaseException:
            give_up()
            raise


def _take_cores(at_once: int) -> Callable[[], None]:
    """A function that each of some threads calls once, and that gives it cores of its own."""
    if at_once == 1 or not hasattr(os, "sched_setaffinity"):
        return lambda: None
    cores = sorted(os.sched_getaffinity(0))
    if at_once > len(cores):
        raise ValueError(f"--at_once={at_once}: this process may use {len(cores)} cores only")
    shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for number in range(at_once):
        shares.put(set(cores[number::at_once]))
    return lambda: os.sched_setaffinity(0, shares.get())  # of this thread


def wait(process: subprocess.Popen[bytes], stop: Preemption) -> int:
    """Waits for a run and returns its exit code; passes a request to stop on to the run, once."""
    asked = False
    while True:
        if stop.requested and not asked:
            process.terminate()
            asked = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.5)
