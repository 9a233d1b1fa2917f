"""Loggers by name: where the numbers of a run go. `metrics.open_loggers` opens those that a config names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rmjax.io import atomic, text
from rmjax.registry import LOGGERS
from rmjax.types import Logger, LoggerContext

__all__ = ["LOGGERS", "Logger", "LoggerContext", "not_installed", "run_id", "saying"]


@contextlib.contextmanager
def saying(path: Path, size: int) -> Iterator[None]:
    """OSErrors inside are of writing `size` bytes to `path`."""
    try:
        yield
    except OSError as error:
        explained = atomic.explained(error, path, size)
        raise OSError(f"{explained}. Every checkpoint is whole: the same line goes on") from error


def run_id(context: LoggerContext, logger: str, create: Callable[[], str]) -> str:
    """The id that a tracker knows a stage by, kept in the workdir, so that a run that goes on finds it again.

    Args:
      context: of the stage. One that starts at step 0 gets a new id.
      logger: the tracker's name.
      create: a new id.
    """
    path = context.workdir / f"{logger}-{context.stage}.id"
    if context.start_step and path.exists():
        return text.read_text(path).strip()
    created = create()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, created)
    return created


def not_installed(logger: str) -> ImportError:
    """What to do where a logger's package is missing."""
    return ImportError(
        f"config.train.loggers: {logger} is not installed: pip install 'rmjax[{logger}]', or leave {logger} out"
    )
