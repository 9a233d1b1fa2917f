"""Areas under ROC curves, means, their intervals over users, and paired differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def auc(scores: Any, labels: Any, mask: Any = None) -> float:
    """The area under the ROC curve: how often a positive outscores a negative, a tie counting half.

    Args:
      scores: any shape, larger = more likely positive.
      labels: the same shape, 1 or 0.
      mask: the same shape, true where an entry counts; all do by default.

    Returns:
      The area; NaN where a class is missing or a score is NaN.
    """
    keep = np.ones(np.shape(scores), bool) if mask is None else np.asarray(mask, bool)
    scores = np.asarray(scores)[keep].astype(np.float64)
    if np.isnan(scores).any():
        return math.nan
    return _area(_distinct(scores), np.asarray(labels)[keep] == 1, np.ones(len(scores)))


def bootstrap(
    scores: Any,
    labels: Any,
    users: Any,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of `auc` over users: whole users are drawn with replacement.

    Args:
      scores: [n], larger = more likely positive.
      labels: [n], 1 or 0.
      users: [n], who each entry belongs to.
      resamples: how many times all users are drawn.
      level: how much of the resampled areas the interval holds.
      seed: of the draws.

    Returns:
      (low, high); NaN where `auc` is.
    """
    if math.isnan(auc(scores, labels)):
        return math.nan, math.nan
    value, positive, user = _distinct(scores), np.asarray(labels) == 1, _distinct(users)
    rng, count = np.random.default_rng(seed), user.max() + 1
    draws = (
        np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples)
    )
    areas = [
        _area(value, positive, draw[user]) for draw in draws
    ]  # NaN where a draw lacks a class: left out
    low, high = np.nanquantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def macro_f1(chosen: np.ndarray, target: np.ndarray, classes: int) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN), 0 of a class that is neither chosen nor right; both [n]."""
    right = np.bincount(target[chosen == target], minlength=classes)
    total = np.bincount(chosen, minlength=classes) + np.bincount(target, minlength=classes)
    return float((2 * right / np.maximum(total, 1)).mean())


def bootstrap_mean(
    values: Any,
    users: Any,
    groups: Any = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval over users of the mean of values [n]; of the mean over groups of their means, where
    groups i64 [n] are given.
    """
    value, user, rng = np.asarray(values, np.float64), _distinct(users), np.random.default_rng(seed)
    group = np.zeros(len(value), np.int64) if groups is None else _distinct(groups)
    count, means = user.max() + 1, []
    for _ in range(resamples):
        weight = np.bincount(rng.integers(count, size=count), minlength=count)[user]
        size = np.bincount(group, weight)
        with np.errstate(invalid="ignore"):
            means.append(np.nanmean(np.bincount(group, weight * value) / size))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(
    values: Any, others: Any, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of values - others, both [n], and its percentile interval over the n pairs, such as seeds.

    Returns:
      (low, mean, high).
    """
    difference = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    draws = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(difference.mean()), float(high)


def _distinct(values: Any) -> np.ndarray:
    """The rank of each among the distinct values, i64 [n]."""
    return np.unique(np.asarray(values), return_inverse=True)[1]


def _area(value: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> float:
    positives, negatives = (
        np.bincount(value, weight * positive),
        np.bincount(value, weight * ~positive),
    )
    pairs = positives.sum() * negatives.sum()
    won = positives @ (np.cumsum(negatives) - negatives / 2)
    return float(won / pairs) if pairs else math.nan
