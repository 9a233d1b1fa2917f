"""CM's synthetic evidence, see `rmjax.data.stories.evidence`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmjax.data.source import Source
from rmjax.registry import at_least, between, one_of, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """The world, and the streams of each logic chain in each split."""

    facts: int = setting(400, at_least(1), "kinds of fact, R_f")
    length: int = setting(200, at_least(1), "facts of a stream, R_l")
    queries: int = setting(40, at_least(1), "kinds of query, R_q")
    answers: int = setting(30, at_least(2), "answers of a query, R_a")
    evidence: int = setting(5, at_least(1), "facts of an evidence, R_c")
    groups: int = setting(20, at_least(1), "groups that facts and queries are split into")
    placing: str = setting("consecutive", one_of("consecutive", "discrete"), "how evidence lies in a stream")
    window: float = setting(0.2, between(0, 1), "longest span of discrete evidence, as a share of the stream")
    parts: int = setting(2, at_least(1), "parts of the stream that evidence lies in: 2 halves, 4 quarters")
    distractors: int = setting(0, at_least(0), "evidences of other queries in a stream")
    train: int = setting(400, at_least(1), "streams of each logic chain to train on")
    valid: int = setting(20, at_least(1), "streams of each logic chain to validate on")
    test: int = setting(50, at_least(1), "streams of each logic chain to test on")


def make(settings: Settings, common: Any, seed: int) -> Source:
    from rmjax.data.stories.evidence import SPLITS, Synthetic, SyntheticConfig

    world = dict(vars(settings))
    samples = {split: world.pop(split) for split in SPLITS}
    return Synthetic(SyntheticConfig(**world), seed, **samples)  # faster made than kept
