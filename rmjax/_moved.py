"""Old names of modules that moved; they work for one release."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping


def forward(old: str, places: Mapping[str, str]) -> Callable[[str], object]:
    """A `__getattr__` for a module whose names moved to other modules.

    Args:
      old: the name of the module.
      places: {name: the module that defines it, or 'module:new name'}; '*' stands for all other
        names.

    Returns:
      The function. It imports the name from its new module, with a DeprecationWarning.
    """

    def __getattr__(name: str) -> object:
        new = places.get(name, places.get("*"))
        if new is None or name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        module, _, renamed = new.partition(":")
        renamed = renamed or name
        warnings.warn(f"{old}.{name} is now {module}.{renamed}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(module), renamed)

    return __getattr__
