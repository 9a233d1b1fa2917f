"""Sorting, see `rmjax.data.texts.sorting`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from rmjax.data.source import Source
from rmjax.registry import at_least, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sequences, and how many in each split."""

    task: ClassVar[str] = "last tokens"

    segments: int = setting(4, at_least(1), "segments of a sequence")
    length: int = setting(0, at_least(0), "symbols of a sequence; 0: the thousands that fit its segments")
    symbols: int = setting(20, at_least(2), "different symbols, all of them asked for")
    train: int = setting(80_000, at_least(1), "sequences to train on")
    valid: int = setting(800, at_least(1), "sequences to validate on")
    test: int = setting(800, at_least(1), "sequences to test on")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.texts.sorting import Sorting, fitting

    options = dict(vars(settings))
    segments = options.pop("segments")
    options["length"] = settings.length or fitting(segments, common.segment_length, settings.symbols)
    return Sorting(seed=seed, segment_length=common.segment_length, **options)
