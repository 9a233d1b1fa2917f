"""RoBERTa (Liu et al. 2019): BERT with other positions, norms and head, see bert.py."""

from __future__ import annotations

from rmjax.models import bert, gpt2
from rmjax.models.bert import make_plain
from rmjax.types import ModelContext, SequenceModel

Settings = gpt2.Settings


def sizes_of(settings: Settings, context: ModelContext) -> bert.Sizes:
    """The sizes for a run; two rows of the table of positions come before the first token's."""
    fields = gpt2.size_fields(settings, context)
    return bert.roberta_sizes(**fields | dict(positions=context.segment_length + 2))


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the classifier without memory, see `rmjax.types.SequenceModel`."""
    return make_plain(sizes_of(settings, context), context.classes)
