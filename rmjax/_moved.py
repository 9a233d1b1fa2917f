"""Names that moved, for one release."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def forward(old: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` of a module whose names moved.

    Args:
      old: the name of the module.
      places: of each name, the module that it is in now; '*' stands for all others.

    Returns:
      The function; it warns of each name that is asked for, once a place.
    """

    def __getattr__(name: str) -> Any:
        new = places.get(name, places.get("*"))
        if new is None or name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(f"{old}.{name} is now {new}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(new), name)

    return __getattr__
