"""Sequence models: Transformers that read a stream segment by segment and keep a state between."""

from rmjax.models.scan import truncated, unroll

__all__ = ["truncated", "unroll"]
