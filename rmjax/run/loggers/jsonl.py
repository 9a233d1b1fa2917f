"""metrics.jsonl in the workdir: a line of JSON for each write, of all stages."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping

from rmjax.io import atomic
from rmjax.registry import NoSettings as Settings
from rmjax.run.loggers import LoggerContext, saying


class Lines:
    """Going on, it takes out what the stage had written after `start_step`; lines of other stages stay."""

    def __init__(self, context: LoggerContext):
        self._stage, self._path = context.stage, context.workdir / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            lines = self._path.read_text(errors="replace").splitlines(keepends=True)
            atomic.write(self._path, "".join(line for line in lines if _stays(line, context)))
        with saying(self._path, 0):
            self._file = self._path.open("ab", buffering=0)

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        line = {"stage": self._stage, "kind": kind, "step": step}
        line |= {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with saying(self._path, len(data)):
            if self._file.write(data) < len(
                data
            ):  # the disk is full; a half line is taken out when the run goes on
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # said by `write`, after which nothing was left to be written
            self._file.close()


def make(settings: Settings, context: LoggerContext) -> Lines:
    """NaN and infinities become strings, so that each line stays JSON."""
    return Lines(context)


def _stays(line: str, context: LoggerContext) -> bool:
    start = context.start_step
    try:
        entry = json.loads(line)
        again = not context.evaluated and entry["kind"] == "valid" and entry["step"] == start
        return line.endswith("\n") and (
            entry["stage"] != context.stage or entry["step"] <= start > 0 and not again
        )
    except (ValueError, TypeError, KeyError):  # the half line of a killed process
        return False
