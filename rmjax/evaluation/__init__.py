"""Metrics by name: what a split's answers are worth. A source names its own in `Questions.metric`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rmjax.evaluation import metrics
from rmjax.registry import METRICS

__all__ = [
    "METRICS",
    "Asked",
    "Metric",
    "best_rank",
    "chosen",
    "group_means",
    "known",
    "mean_metric",
    "rank",
]


class Asked(NamedTuple):
    """The questions of n examples, and what was answered."""

    scores: (
        np.ndarray
    )  # f [n, Q] of clicks, [n, Q, C] of classes or choices; or i [n, Q], which one was chosen
    target: np.ndarray  # i [n, Q]
    mask: np.ndarray  # bool [n, Q], which questions are asked
    also: np.ndarray | None = None  # i [n, Q], a second right choice, -1 where there is none
    groups: Mapping[str, np.ndarray] = {}  # {name: bool [n, Q]}, parts of the asked questions


class Metric(NamedTuple):
    """A metric as functions of `Asked`."""

    measure: Callable[[Asked], tuple[float, dict[str, float]]]
    """measure(asked): the metric, and what is reported beside it, such as that of each group."""
    interval: Callable[[Asked, np.ndarray, int], tuple[float, float]]
    """interval(asked, users, seed): 95 % from, to; users [asked questions] are drawn with replacement."""
    less_is_better: bool = False
    summary: Callable[[dict[str, float]], dict[str, float]] = lambda others: {}
    """summary(what measure reports beside): more columns of the final table."""


def mean_metric(values: Callable[[Asked], np.ndarray]) -> Metric:
    """The mean of the asked questions' values, and of each group's.

    Args:
      values: asked -> f64 [n, Q].
    """

    def measure(asked: Asked) -> tuple[float, dict[str, float]]:
        each = known(asked, values)
        return float(each[asked.mask].mean()), group_means(asked, each)

    def interval(asked: Asked, users: np.ndarray, seed: int) -> tuple[float, float]:
        return metrics.bootstrap_mean(known(asked, values)[asked.mask], users, seed=seed)

    return Metric(measure, interval)


def known(asked: Asked, values: Callable[[Asked], np.ndarray]) -> np.ndarray:
    """The values f64 [n, Q]; NaN where a score is."""
    scores, target = asked.scores, asked.target
    wrong = np.isnan(scores).any(-1) if scores.ndim > target.ndim else np.zeros(target.shape, bool)
    return np.where(wrong, np.nan, values(asked))


def group_means(asked: Asked, values: np.ndarray) -> dict[str, float]:
    """The mean of each group that is asked anything."""
    return {
        name: float(values[inside].mean()) for name, inside in asked.groups.items() if inside.any()
    }


def chosen(asked: Asked) -> np.ndarray:
    """I [n, Q], which class or choice was answered."""
    return asked.scores if asked.scores.ndim == asked.target.ndim else asked.scores.argmax(-1)


def rank(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """f64 [n, Q], the place of the right one of [n, Q, C], the best being 1; among equals the middle."""
    right = np.take_along_axis(scores, target[..., None], -1)
    equal = (scores == right).sum(-1) - 1
    return 1 + (scores > right).sum(-1) + equal / 2


def best_rank(asked: Asked) -> np.ndarray:
    """f64 [n, Q], the better place of the right answers."""
    ranks = rank(asked.scores, asked.target)
    if asked.also is None:
        return ranks
    return np.where(
        asked.also < 0, ranks, np.minimum(ranks, rank(asked.scores, np.maximum(asked.also, 0)))
    )
