"""Memory machines by name, and `memorize`, which writes streams into any of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rmjax.machines.costs import Costs, costs_of
from rmjax.machines.live import LiveStream, current_memory, feed, open_stream
from rmjax.machines.scan import Memorized, inert, memorize
from rmjax.registry import MACHINES
from rmjax.types import Context, MemoryMachine

__all__ = [
    "MACHINES",
    "Costs",
    "LiveStream",
    "Memorized",
    "build",
    "costs_of",
    "current_memory",
    "feed",
    "make",
    "memorize",
    "open_stream",
]


def make(kind: str, num_items: int, **options: Any) -> MemoryMachine:
    """Builds a machine from keyword arguments.

    Args:
      kind: name in the registry `MACHINES`, such as 'rehearsal'.
      num_items: number of item ids. 0: the items are feature vectors.
      **options: settings of the kind, and fields of `types.Context`.

    Returns:
      The machine; a wholly padded segment leaves its memory as it is.

    Raises:
      ValueError: the kind or an option does not exist, a value is out of range, or two values
        contradict each other.
    """
    if isinstance(num_items, bool) or not isinstance(num_items, int | np.integer) or num_items < 0:
        raise ValueError(f"num_items = {num_items!r}: must be a whole number, at least 0")
    of_context = {field.name for field in dataclasses.fields(Context)} & options.keys()
    context = Context(**{name: options.pop(name) for name in of_context})
    settings = MACHINES.settings(kind, options)
    unknown = [name for name in options if not hasattr(settings, name)]
    if unknown:
        known = [field.name for part in (settings, context) for field in dataclasses.fields(part)]
        raise ValueError(
            f"machine {kind!r} has no option {unknown[0]!r}; there are {', '.join(known)}"
        )
    return build(kind, num_items, settings, context)


def build(kind: str, num_items: int, settings: object, context: Context) -> MemoryMachine:
    """Builds a machine from the settings dataclass of its kind.

    `inert` wraps the `write` of every machine, so a kind need not treat padded segments itself.

    Args:
      kind: name in the registry `MACHINES`.
      num_items: number of item ids. 0: the items are feature vectors.
      settings: an instance of the kind's `Settings`.
      context: facts about the streams, such as their segment length.

    Returns:
      The machine.

    Raises:
      ValueError: the kind does not exist, or the settings contradict the context.
    """
    if context.segment_encoder is not None and not _takes_segment_encoder(kind):
        kinds = ", ".join(filter(_takes_segment_encoder, MACHINES))
        raise ValueError(f"machine {kind!r} reads no segment_encoder: leave it out; {kinds} do")
    machine: MemoryMachine = MACHINES[kind].make(num_items, settings, context)
    return machine._replace(write=inert(machine.write))


def _takes_segment_encoder(kind: str) -> bool:
    return bool(getattr(MACHINES[kind].settings, "takes_segment_encoder", False))
