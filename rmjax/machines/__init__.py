"""Memory machines by name, and `memorize`, which writes streams into any of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rmjax.machines.live import LiveStream, current_memory, feed, open_stream
from rmjax.machines.scan import Memorized, inert, memorize
from rmjax.registry import MACHINES
from rmjax.types import Context, MemoryMachine

__all__ = [
    "MACHINES",
    "LiveStream",
    "Memorized",
    "build",
    "current_memory",
    "feed",
    "make",
    "memorize",
    "open_stream",
]


def make(kind: str, num_items: int, **options: Any) -> MemoryMachine:
    """A machine of a kind, over `num_items` item ids (0: over features).

    Args:
      options: the settings of the kind, and the fields of `types.Context`.

    Raises:
      ValueError: no such kind or option; a value out of range, or in conflict with another.
    """
    if isinstance(num_items, bool) or not isinstance(num_items, int | np.integer) or num_items < 0:
        raise ValueError(f"num_items = {num_items!r}: must be a whole number, at least 0")
    of_context = {field.name for field in dataclasses.fields(Context)} & options.keys()
    context = Context(**{name: options.pop(name) for name in of_context})
    settings = MACHINES.settings(kind, options)
    unknown = [name for name in options if not hasattr(settings, name)]
    if unknown:
        options_are = [
            field.name for kind in (settings, context) for field in dataclasses.fields(kind)
        ]
        raise ValueError(
            f"machine {kind!r} has no option {unknown[0]!r}; there are {', '.join(options_are)}"
        )
    return build(kind, num_items, settings, context)


def build(kind: str, num_items: int, settings: Any, context: Context) -> MemoryMachine:
    """As `make`, from a kind's own settings; here `write` becomes inert to padding, whatever the kind."""
    machine = MACHINES[kind].make(num_items, settings, context)
    return machine._replace(write=inert(machine.write))
