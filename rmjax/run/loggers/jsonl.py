"""metrics.jsonl in the workdir: one line of JSON for each write, of all stages."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping

from rmjax.io import atomic
from rmjax.registry import NoSettings as Settings
from rmjax.run.loggers import LoggerContext, explain_errors


class Lines:
    """Appends lines to metrics.jsonl, see `rmjax.types.Logger`.

    A stage that continues first removes the lines that it wrote after `start_step`. Lines of other
    stages stay.

    Args:
      context: of the stage.
    """

    def __init__(self, context: LoggerContext):
        self._stage, self._path = context.stage, context.workdir / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            lines = self._path.read_text(errors="replace").splitlines(keepends=True)
            atomic.write(self._path, "".join(line for line in lines if _stays(line, context)))
        with explain_errors(self._path, 0):
            self._file = self._path.open("ab", buffering=0)

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        """Writes one line. NaN and infinities become strings, so that it stays JSON."""
        finite = {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        line = {"stage": self._stage, "kind": kind, "step": step} | finite
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with explain_errors(self._path, len(data)):
            # A partial write means a full disk. The partial line is removed when the run continues.
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Closes the file."""
        # `write` has raised the error already, and no data are waiting.
        with contextlib.suppress(OSError):
            self._file.close()


def make(settings: Settings, context: LoggerContext) -> Lines:
    """Builds the logger, see `rmjax.types.Logger`."""
    return Lines(context)


def _stays(line: str, context: LoggerContext) -> bool:
    """Whether a line was written by another stage, or at a step that is not repeated."""
    start = context.start_step
    try:
        entry = json.loads(line)
        again = not context.evaluated and entry["kind"] == "valid" and entry["step"] == start
        return line.endswith("\n") and (
            entry["stage"] != context.stage or entry["step"] <= start > 0 and not again
        )
    except (ValueError, TypeError, KeyError):  # the partial line of a killed process
        return False
