"""A factor that rises from 0 to 1 along a line."""

from __future__ import annotations

import optax

from rmjax.registry import NoSettings as Settings


def make(settings: Settings, steps: int) -> optax.Schedule:
    """Builds the schedule over `steps` steps."""
    return optax.linear_schedule(0.0, 1.0, steps)
