"""Memory machines by name, and `memorize`, which writes streams into any of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from rmjax.machines import buffer, continual, gru, rehearsal, slots
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

# Of whole numbers: other settings have checks of their own, or take any value.
LEAST = dict(num_items=0, item_dim=0, slot_dim=0, timescale=0, recent=0, width=0) | dict.fromkeys(
    ("dim", "slots", "layers", "heads", "hops", "segment_length", "subspaces", "buffer_length"), 1
)


def make(kind: str, num_items: int, **settings: Any) -> MemoryMachine:
    """The machine of this kind over `num_items` item ids (0: over features); settings are those of its own `make`.

    Raises:
      ValueError: there is no such kind, or a setting has a value that cannot be.
      TypeError: the kind has no such setting.
    """
    if kind not in MAKERS:
        raise ValueError(f"unknown machine {kind!r}; there are {', '.join(MAKERS)}")
    known = _settings(kind)
    for name, value in {"num_items": num_items, **settings}.items():
        least = LEAST.get(name)
        if name != "num_items" and name not in known:
            raise TypeError(f"machine {kind!r} has no setting {name!r}; there are {', '.join(known)}")
        if least is not None and not (isinstance(value, int | np.integer) and value >= least):
            raise ValueError(f"{name} = {value!r}: must be a whole number, at least {least}")
        if name == "dropout" and not 0 <= value < 1:
            raise ValueError(f"dropout = {value!r}: must be a number, from 0 to just below 1")
    return MAKERS[kind](num_items, **settings)


def _settings(kind: str) -> list[str]:
    """The names of a kind's settings; some makers hand what they do not know on to `slots.make`."""
    own = inspect.signature(MAKERS[kind]).parameters
    more = inspect.signature(slots.make).parameters if "settings" in own else {}
    return [name for name in {**own, **more} if name not in ("num_items", "update", "settings")]


__all__ = ["MAKERS", "LiveStream", "Memorized", "current_memory", "feed", "make", "memorize", "open_stream"]
