"""The runs of a table: their folders and flags, and their processes."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rmjax.run.workdir import Preemption
from rmjax.tools.tables import Table


class Job(NamedTuple):
    """One run.

    Attributes:
      setting: name of the setting, '' for a table without settings.
      row: name of the row.
      seed: seed of the run.
      workdir: folder of the run.
      flags: flags of rmjax.main that change the config.
    """

    setting: str
    row: str
    seed: int
    workdir: Path
    flags: list[str]


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
        for setting, common in table.settings.items():
            first: Path | None = None
            for name, row in table.rows.items():
                folder = workdir / f"seed{seed}" / slug(setting) / slug(name)
                values = {**common, **row.changes, "seed": seed}
                if table.share_teacher and first:
                    values["teacher.dir"] = str(first)
                first = first or folder
                if row.start:
                    values["train.start_from"] = str(starts[row.start])
                flags = [f"--config.{key}={value}" for key, value in values.items()]
                made.append(Job(setting, name, seed, folder, flags))
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


def wait(process: subprocess.Popen[bytes], stop: Preemption) -> int:
    """Waits for a run and returns its exit code; passes a request to stop on to the run, once."""
    asked = False
    while True:
        if stop.requested and not asked:
            process.terminate()
            asked = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.5)
