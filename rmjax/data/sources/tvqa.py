"""TVQA, see `rmjax.data.stories.tvqa`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmjax.data.source import Source
from rmjax.registry import at_least, below, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is read of a clip, and which clips validate."""

    max_words: int = setting(300, at_least(1), "words kept of a clip's subtitles")
    valid_fraction: float = setting(0.1, below(0, 1), "share of the training clips for validation")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.stories.tvqa import tvqa

    options = dict(segment_length=common.segment_length, min_count=common.min_count, buckets=common.buckets)
    return tvqa(common.dir, common.cache_dir, seed, **options, **vars(settings))
