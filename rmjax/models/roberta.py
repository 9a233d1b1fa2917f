"""RoBERTa (Liu et al. 2019): BERT with other positions, norms and head; see bert.py."""

from __future__ import annotations

from rmjax.models import bert, gpt2
from rmjax.models.bert import make_plain
from rmjax.types import ModelContext, SequenceModel

Settings = gpt2.Settings


def sizes_of(settings: Settings, context: ModelContext) -> bert.Sizes:
    """RoBERTa's, with a position for each token of a segment; they begin with the third."""
    return bert.roberta(
        **gpt2.size_fields(settings, context) | dict(positions=context.segment_length + 2)
    )


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """The classifier of a run's settings, which remembers nothing."""
    return make_plain(sizes_of(settings, context), context.classes)
