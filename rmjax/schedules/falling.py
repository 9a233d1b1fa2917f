"""A factor that falls from 1 to 0 along a line."""

from __future__ import annotations

import optax

from rmjax.registry import NoSettings as Settings


def make(settings: Settings, steps: int) -> optax.Schedule:
    """Builds the schedule over `steps` steps."""
    return optax.linear_schedule(1.0, 0.0, steps)
