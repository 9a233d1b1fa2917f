"""TensorBoard events in <workdir>/tensorboard/<stage>."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

from rmjax.registry import NoSettings as Settings
from rmjax.run.loggers import LoggerContext, explain_errors


class Events:
    """Writes scalars, in one group for each kind, see `rmjax.types.Logger`.

    The first event of a stage that continues removes the values of later steps.

    Args:
      context: of the stage.
    """

    def __init__(self, context: LoggerContext):
        import tensorboardX  # on use: the import takes long, and every command knows this logger

        start = context.start_step
        self._folder = context.workdir / "tensorboard" / context.stage
        with explain_errors(self._folder, 0):
            self._board = tensorboardX.SummaryWriter(
                str(self._folder), purge_step=start + 1 if start else 0, filename_suffix=f".{start}"
            )

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        """Writes one scalar for each value. Tags have only characters that TensorBoard takes."""
        with explain_errors(self._folder, 0):
            for name, value in values.items():
                tag = re.sub(r"[^-\w./]+", "_", f"{kind}/{name.replace('@', '_at_')}")
                self._board.add_scalar(tag, value, step)
            self._board.flush()

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # `write` has raised it already
            self._board.close()


def make(settings: Settings, context: LoggerContext) -> Events:
    """Builds the logger, see `rmjax.types.Logger`."""
    return Events(context)
