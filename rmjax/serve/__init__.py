"""Serving a trained model: live streams of many users, HTTP, exports and a load test."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmjax.serve.model import Model, open_model
    from rmjax.serve.recommend import Recommended
    from rmjax.serve.store import Damaged, QueueFull, StreamEnd, StreamInfo, Streams, WrongLength

# {public name: module}. A name is imported at its first use, so that commands start fast.
_PUBLIC = {
    "Damaged": "rmjax.serve.store",
    "Model": "rmjax.serve.model",
    "QueueFull": "rmjax.serve.store",
    "Recommended": "rmjax.serve.recommend",
    "StreamEnd": "rmjax.serve.store",
    "StreamInfo": "rmjax.serve.store",
    "Streams": "rmjax.serve.store",
    "WrongLength": "rmjax.serve.store",
    "open_model": "rmjax.serve.model",
}
__all__ = [
    "Damaged",
    "Model",
    "QueueFull",
    "Recommended",
    "StreamEnd",
    "StreamInfo",
    "Streams",
    "WrongLength",
    "open_model",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rmjax.serve' has no attribute {name!r}")
