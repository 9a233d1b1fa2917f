"""A factor that falls from 1 to 0 along half a cosine."""

from __future__ import annotations

import optax

from rmjax.registry import NoSettings as Settings


def make(settings: Settings, steps: int) -> optax.Schedule:
    """Builds the schedule over `steps` steps."""
    return optax.cosine_decay_schedule(1.0, steps)
