"""Weights & Biases: one run for each stage, grouped by workdir.

WANDB_MODE=offline needs no network. W&B takes steps in rising order and drops others. A run that
continues may repeat steps that W&B has. They stay as they were first written, with the same values.
A run that starts at step 0 again is a new one there. Offline, a run that continues has a folder of
its own, with the same id. Steps that both folders have are merged only when they are synced.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rmjax.registry import setting
from rmjax.run.loggers import LoggerContext, not_installed, run_id

if TYPE_CHECKING:
    import wandb


@dataclasses.dataclass(frozen=True)
class Settings:
    """Keys in the section `logger`."""

    project: str = setting("rmjax", doc="wandb: the project; mlflow: the experiment")


class Tracked:
    """A run at W&B, see `rmjax.types.Logger`.

    Args:
      run: the run.
    """

    def __init__(self, run: wandb.Run):
        self._run = run

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        """Sends the values."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


def make(settings: Settings, context: LoggerContext) -> Tracked:
    """Builds the logger, see `rmjax.types.Logger`.

    Args:
      settings: see `Settings`.
      context: of the stage. If it continues, so does its run at W&B.

    Returns:
      The logger.

    Raises:
      ImportError: the package wandb is missing.
    """
    try:
        import wandb
    except ImportError as error:
        raise not_installed("wandb") from error
    run = wandb.init(
        project=settings.project,
        group=context.workdir.name,
        name=f"{context.workdir.name} {context.stage}",
        id=run_id(context, "wandb", lambda: uuid.uuid4().hex),
        resume="allow",
        dir=str(context.workdir),
        config=context.config,
        allow_val_change=True,
    )
    return Tracked(run)
