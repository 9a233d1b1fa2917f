"""Memory machines by name, and `memorize`, which writes streams into any of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rmjax.machines import buffer, continual, gru, rehearsal
from rmjax.machines.live import LiveStream, current_memory, feed, open_stream
from rmjax.machines.scan import Memorized, memorize
from rmjax.types import MemoryMachine

MAKERS: dict[str, Callable[..., MemoryMachine]] = {
    "rehearsal": rehearsal.make,
    "continual": continual.make,
    "gru": gru.make,
    "buffer": buffer.make,
    "directly_reason": functools.partial(buffer.make, encoder="gru"),
    "multihop_reason": functools.partial(buffer.make, encoder="bigru"),
}


def make(kind: str, num_items: int, **settings: Any) -> MemoryMachine:
    """The machine of this kind over `num_items` item ids (0: over features); settings are those of its own `make`."""
    if kind not in MAKERS:
        raise ValueError(f"unknown machine {kind!r}; there are {', '.join(MAKERS)}")
    return MAKERS[kind](num_items, **settings)


__all__ = ["MAKERS", "LiveStream", "Memorized", "current_memory", "feed", "make", "memorize", "open_stream"]
