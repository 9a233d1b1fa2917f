"""bAbI, see `rmjax.data.stories.babi`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmjax.data.source import Source
from rmjax.registry import at_least, one_of, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which tasks, and how their stories are written."""

    subset: str = setting("en-10k", one_of("en", "en-10k"), "1,000 or 10,000 questions a task")
    tasks: str = setting("", doc="numbers of the tasks, such as '1,2,15'; empty: all 20")
    per_question: bool = setting(False, doc="writes a story anew for each of its questions")
    max_sentences: int = setting(0, at_least(0), "latest sentences kept of a story; 0: all")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.stories.babi import babi

    options = dict(segment_length=common.segment_length, buckets=common.buckets)
    return babi(common.dir, common.cache_dir, **options, **vars(settings))
