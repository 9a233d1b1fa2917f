"""Metrics by name: they score the answers of a split. A source names one in `Questions.metric`."""

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
    "keep_nan",
    "mean_metric",
    "rank",
]


class Asked(NamedTuple):
    """The questions of n examples, and the answers.

    Attributes:
      scores: f [n, Q] of clicks; f [n, Q, C] of classes or choices; i [n, Q], the chosen answer; or
        f [n, Q], the rank of the target, where an item is the answer.
      target: i [n, Q], the right answer.
      mask: bool [n, Q], which questions are asked.
      also: i [n, Q], a second right choice, -1 where a question has one only; None: all have one.
      groups: {name: bool [n, Q]}, subsets of the asked questions.
      position: i [n, Q], places before each question; None: all come after the stream.
      items: number of items, where an item is the answer.
    """

    scores: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    also: np.ndarray | None = None
    groups: Mapping[str, np.ndarray] = {}
    position: np.ndarray | None = None
    items: int = 0


class Metric(NamedTuple):
    """A metric as functions of `Asked`."""

    measure: Callable[[Asked], tuple[float, dict[str, float]]]
    """measure(asked): the metric, and {name: further value}, for instance one for each group."""
    interval: Callable[[Asked, np.ndarray, int], tuple[float, float]]
    """interval(asked, users, seed): the 95 % interval (low, high) of the metric.

    It draws users with replacement; users [asked questions] says which user each question is from.
    """
    less_is_better: bool = False
    summary: Callable[[dict[str, float]], dict[str, float]] = lambda others: {}
    """summary(others): more columns of the final table, from the further values."""
    answers: tuple[str, ...] = ("class", "choice")
    """The forms of answers that it measures, see `Questions.answer`."""


def mean_metric(values: Callable[[Asked], np.ndarray]) -> Metric:
    """A metric that is the mean of one value per asked question, over all and over each group.

    Args:
      values: asked -> f64 [n, Q].

    Returns:
      The metric.
    """

    def measure(asked: Asked) -> tuple[float, dict[str, float]]:
        value = keep_nan(asked, values)
        return float(value[asked.mask].mean()), group_means(asked, value)

    def interval(asked: Asked, users: np.ndarray, seed: int) -> tuple[float, float]:
        return metrics.bootstrap_mean(keep_nan(asked, values)[asked.mask], users, seed=seed)

    return Metric(measure, interval)


def keep_nan(asked: Asked, values: Callable[[Asked], np.ndarray]) -> np.ndarray:
    """The values of a metric, with NaN where a score is NaN.

    Args:
      asked: the questions and answers.
      values: asked -> f64 [n, Q].

    Returns:
      f64 [n, Q].
    """
    scores, target = asked.scores, asked.target
    wrong = np.isnan(scores).any(-1) if scores.ndim > target.ndim else np.zeros(target.shape, bool)
    return np.where(wrong, np.nan, values(asked))


def group_means(asked: Asked, values: np.ndarray) -> dict[str, float]:
    """The mean of values in each group; groups without questions are left out.

    Args:
      asked: the questions, with their groups.
      values: f64 [n, Q], one for each question.

    Returns:
      {name of the group: mean}.
    """
    groups = asked.groups.items()
    return {name: float(values[inside].mean()) for name, inside in groups if inside.any()}


def chosen(asked: Asked) -> np.ndarray:
    """The class or choice that was answered.

    Args:
      asked: the questions and answers.

    Returns:
      i [n, Q].
    """
    return asked.scores if asked.scores.ndim == asked.target.ndim else asked.scores.argmax(-1)


def rank(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rank of the right answer.

    Args:
      scores: f [n, Q, C].
      target: i [n, Q], the right answer; C where it is no class.

    Returns:
      f64 [n, Q], 1 is the best; equal scores share the mean of their ranks. The rank of an answer
      that is no class is infinite.
    """
    if scores.ndim == target.ndim:  # a reference that only names its answer
        return np.where(scores == target, 1.0, np.inf)
    is_class = target < scores.shape[-1]
    right = np.take_along_axis(scores, np.where(is_class, target, 0)[..., None], -1)
    equal = (scores == right).sum(-1) - 1
    return np.where(is_class, 1 + (scores > right).sum(-1) + equal / 2, np.inf)


def best_rank(asked: Asked) -> np.ndarray:
    """The rank of the better one of the right answers.

    Args:
      asked: the questions and answers; `also` has second right answers.

    Returns:
      f64 [n, Q], 1 is the best.
    """
    ranks = rank(asked.scores, asked.target)
    if asked.also is None:
        return ranks
    second = rank(asked.scores, np.maximum(asked.also, 0))
    return np.where(asked.also < 0, ranks, np.minimum(ranks, second))
