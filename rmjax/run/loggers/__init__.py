"""Loggers by name: where the numbers of a run go. `reporting.open_loggers` opens them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rmjax.io import atomic, text
from rmjax.registry import LOGGERS
from rmjax.types import Logger, LoggerContext

__all__ = ["LOGGERS", "Logger", "LoggerContext", "explain_errors", "not_installed", "run_id"]


@contextlib.contextmanager
def explain_errors(path: Path, size: int) -> Iterator[None]:
    """Explains errors of writing to a file.

    Args:
      path: the file or folder that is written.
      size: bytes that are written.

    Raises:
      OSError: what was raised inside, with the file, the cause and the cure.
    """
    try:
        yield
    except OSError as error:
        explained = atomic.explained(error, path, size)
        raise OSError(f"{explained}. Every checkpoint is whole: the same line goes on") from error


def run_id(context: LoggerContext, logger: str, create: Callable[[], str]) -> str:
    """The id of a stage in a tracker. The workdir keeps it for a run that continues.

    Args:
      context: of the stage. A stage that starts at step 0 gets a new id.
      logger: the tracker's name.
      create: makes a new id.

    Returns:
      The id.
    """
    path = context.workdir / f"{logger}-{context.stage}.id"
    if context.start_step and path.exists():
        return text.read_text(path).strip()
    created = create()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, created)
    return created


def not_installed(logger: str) -> ImportError:
    """The error of a logger whose package is missing, with its cure."""
    return ImportError(
        f"config.train.loggers: {logger} is not installed: pip install 'rmjax[{logger}]', or leave "
        f"{logger} out"
    )
