"""MovieLens, see `rmjax.data.clicks.movielens`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmjax.data.source import Source, cached
from rmjax.registry import at_least, between, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """When questions are asked, and which are the test."""

    test_fraction: float = setting(0.2, between(0, 1), "share of targets, the latest, for the test")
    valid_fraction: float = setting(0.1, between(0, 1), "share of the targets before those, for validation")
    every: int = setting(10, at_least(1), "clicks from one question to the next")
    first: int = setting(20, at_least(1), "clicks before the first question")
    max_targets: int = setting(32, at_least(1), "most targets of an example; a user with more has several")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.clicks.movielens import movielens

    return cached(movielens(common.dir, common.cache_dir, seed, **vars(settings)), common.ram_bytes)
