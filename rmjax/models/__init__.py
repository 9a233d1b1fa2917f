"""Sequence models: what reads a stream segment by segment with a Transformer, and what it remembers in between."""

from rmjax.models.scan import unroll

__all__ = ["unroll"]
