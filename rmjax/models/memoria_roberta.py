"""Memoria RoBERTa (Memoria section 4.3): memoria_bert.py on RoBERTa."""

from __future__ import annotations

from rmjax.models import roberta
from rmjax.models.memoria_bert import Settings, build_on
from rmjax.types import ModelContext, SequenceModel

__all__ = ["Settings", "build"]


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the classifier, see `rmjax.types.SequenceModel`."""
    return build_on(roberta.sizes_of(settings, context), context)
