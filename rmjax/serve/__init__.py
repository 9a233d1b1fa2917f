"""Serving a trained model: live streams of many users, exports and a load test."""

from rmjax.serve.model import Model, open_model
from rmjax.serve.recommend import Recommended
from rmjax.serve.store import Damaged, QueueFull, StreamInfo, Streams, WrongLength

__all__ = [
    "Damaged",
    "Model",
    "QueueFull",
    "Recommended",
    "StreamInfo",
    "Streams",
    "WrongLength",
    "open_model",
]
