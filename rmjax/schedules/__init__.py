"""Schedules by name: a rate or a weight over the steps, as a factor of its largest value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rmjax.registry import SCHEDULES
from rmjax.types import Array

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Schedule = Callable[[Array], Array]  # step i32 [] -> factor f32 []

__all__ = ["SCHEDULES", "Schedule", "build"]


def build(name: str, steps: int, config: ConfigDict | None = None) -> Schedule | None:
    """Builds a schedule.

    Args:
      name: one of `registry.SCHEDULES`.
      steps: length of the schedule.
      config: of the run; its section `schedule` has the keys of schedules with settings. None:
        defaults.

    Returns:
      A function of the step; None if the factor is always 1.

    Raises:
      ValueError: no schedule has this name, or a value of its settings is wrong.
    """
    settings = SCHEDULES.settings(name, getattr(config, "schedule", {}), "config.schedule.", config)
    return SCHEDULES[name].make(settings, steps)
