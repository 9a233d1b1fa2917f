"""Schedules by name: how a rate or a weight changes over the steps, as a factor of its largest value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rmjax.registry import SCHEDULES
from rmjax.types import Array

Schedule = Callable[[Array], Array]  # step i32 [] -> factor f32 []

__all__ = ["SCHEDULES", "Schedule", "build"]


def build(name: str, steps: int, config: Any = None) -> Schedule | None:
    """The schedule of a name.

    Args:
      name: one of `registry.SCHEDULES`.
      steps: over which it runs.
      config: of the run, whose section `schedule` has the keys of schedules that have some.

    Returns:
      A function of the step; None: the factor is always 1.
    """
    settings = SCHEDULES.settings(name, getattr(config, "schedule", {}), "config.schedule.", config)
    return SCHEDULES[name].make(settings, steps)
