"""TensorBoard events in <workdir>/tensorboard/<stage>."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import tensorboardX

from rmjax.registry import NoSettings as Settings
from rmjax.run.loggers import LoggerContext, saying


class Events:
    """Going on, its first event ends what was written of later steps."""

    def __init__(self, context: LoggerContext):
        start = context.start_step
        self._folder = context.workdir / "tensorboard" / context.stage
        with saying(self._folder, 0):
            self._board = tensorboardX.SummaryWriter(
                str(self._folder), purge_step=start + 1 if start else 0, filename_suffix=f".{start}"
            )

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        with saying(self._folder, 0):
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # said by `write`
            self._board.close()


def make(settings: Settings, context: LoggerContext) -> Events:
    """Values are scalars, in a group for each kind."""
    return Events(context)
