"""Hyperpartisan news, see `rmjax.data.texts.hyperpartisan`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from rmjax.data.source import Source
from rmjax.registry import a_path, at_least, one_of, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which articles are the test, and what is read of one."""

    task: ClassVar[str] = "documents"

    split: str = setting("unseen", one_of("unseen", "published"), "which articles are the test")
    tokenizer: str = setting("words", a_path, "'words', or the path of a tokenizer.json")
    title: bool = setting(True, doc="an article's title is its first sentence")
    max_segments: int = setting(0, at_least(0), "first segments kept of an article; 0: all")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.texts.hyperpartisan import hyperpartisan

    options = dict(segment_length=common.segment_length, min_count=common.min_count, buckets=common.buckets)
    return hyperpartisan(common.dir, common.cache_dir, **options, **vars(settings))
