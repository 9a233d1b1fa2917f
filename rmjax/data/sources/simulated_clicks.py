"""Simulated clicks, see `rmjax.data.clicks.simulated`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from rmjax.data.source import Source, cached
from rmjax.registry import a_seed, at_least, between, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """The world, and its users in each split."""

    section: ClassVar[str] = "simulated"

    train: int = setting(20000, at_least(1), "users to train on")
    valid: int = setting(1000, at_least(1), "users to validate on")
    test: int = setting(2000, at_least(1), "users to test on")
    clicks_min: int = setting(1000, at_least(1), "clicks of the shortest stream")
    clicks_max: int = setting(1000, at_least(1), "clicks of the longest stream")
    visit: int = setting(10, at_least(1), "clicks a visit")
    clusters: int = setting(32, at_least(9), "clusters of items")
    styles: int = setting(3, at_least(2), "styles a cluster")
    items_per_style: int = setting(20, at_least(1), "items a style")
    staples: int = setting(80, at_least(1), "items everyone clicks")
    zipf: float = setting(1.0, at_least(0), "how uneven items are in popularity; 0: even")
    browse: float = setting(0.2, between(0, 1), "chance that a visit is to a cluster of no interest")
    drift: float = setting(0.1, between(0, 1), "chance that an interest's style changes between its visits")
    staple_rate: float = setting(0.3, between(0, 1), "chance that a click is on a staple")
    explore: float = setting(0.1, between(0, 1), "chance that a positive is of no interest")
    targets: int = setting(8, at_least(1), "positives of a user, each with a negative")
    hard: float = setting(0.2, between(0, 1), "chance that a negative has its positive's cluster")
    world_seed: int = setting(0, a_seed, "shuffles the item ids")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.clicks.simulated import SPLITS, ClicksConfig, SimulatedClicks

    world = dict(vars(settings))
    users = {split: world.pop(split) for split in SPLITS}
    return cached(SimulatedClicks(ClicksConfig(**world), seed, **users), common.ram_bytes)
