"""Nothing changes."""

from __future__ import annotations

from rmjax.registry import NoSettings as Settings


def make(settings: Settings, steps: int) -> None:
    """None: the factor is always 1, and optimizers keep no count of steps for it."""
