"""NarrativeQA, see `rmjax.data.stories.narrativeqa`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmjax.data.source import Source
from rmjax.registry import at_least, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is read of a summary."""

    max_segments: int = setting(64, at_least(1), "segments kept of a summary")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.stories.narrativeqa import narrativeqa

    options = dict(segment_length=common.segment_length, min_count=common.min_count, buckets=common.buckets)
    return narrativeqa(common.dir, common.cache_dir, **options, **vars(settings))
