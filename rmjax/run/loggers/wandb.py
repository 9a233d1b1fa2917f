"""Weights & Biases: a run for each stage, in one group for the workdir. WANDB_MODE=offline needs no network.

W&B takes steps in rising order and drops others. A run that goes on may repeat steps that W&B has: they stay as they
were first written, and have the same values. A run that starts at step 0 again is a new one there. Offline, a run that
goes on has a folder of its own, with the same id; steps that both folders have meet only when they are synced.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any

from rmjax.registry import setting
from rmjax.run.loggers import LoggerContext, not_installed, run_id


@dataclasses.dataclass(frozen=True)
class Settings:
    project: str = setting("rmjax", doc="wandb: the project; mlflow: the experiment")


class Tracked:
    """A run at W&B."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def make(settings: Settings, context: LoggerContext) -> Tracked:
    """Goes on with the stage's run, if it had begun.

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
