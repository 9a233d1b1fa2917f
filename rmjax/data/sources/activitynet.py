"""ActivityNet-QA, see `rmjax.data.stories.activitynet`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmjax.data.source import Source
from rmjax.registry import a_path, at_least, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """The videos' frames and the classes."""

    features: str = setting("", a_path, "frame features: a folder, or one .h5 file")
    frames: int = setting(200, at_least(1), "frames taken of a video")
    answers: int = setting(1000, at_least(1), "classes: the most frequent answers")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.stories.activitynet import activitynet

    options = dict(segment_length=common.segment_length, ram_bytes=common.ram_bytes)
    return activitynet(common.dir, cache_dir=common.cache_dir, **options, **vars(settings))
