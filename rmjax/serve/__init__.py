"""Serving a trained model: live streams of many users, exports and a load test."""

from rmjax.serve.model import Model, open_model
from rmjax.serve.recommend import Recommended
from rmjax.serve.store import Streams

__all__ = ["Model", "Recommended", "Streams", "open_model"]
