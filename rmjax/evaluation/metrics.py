"""Areas under ROC curves, means, bootstrap intervals over users, and paired differences."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def auc(scores: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> float:
    """The area under the ROC curve.

    This is how often a positive has a larger score than a negative; a tie counts one half.

    Args:
      scores: any shape, larger = more likely positive.
      labels: the same shape, 1 or 0.
      mask: the same shape, true where an entry counts; None: all entries count.

    Returns:
      The area; NaN where a class is missing or a score is NaN.
    """
    keep = np.ones(np.shape(scores), bool) if mask is None else np.asarray(mask, bool)
    kept = np.asarray(scores)[keep].astype(np.float64)
    if np.isnan(kept).any():
        return math.nan
    return _area(_distinct(kept), np.asarray(labels)[keep] == 1, np.ones(len(kept)))


def bootstrap(
    scores: ArrayLike,
    labels: ArrayLike,
    users: ArrayLike,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The bootstrap percentile interval of `auc`; it draws users with replacement.

    Args:
      scores: [n], larger = more likely positive.
      labels: [n], 1 or 0.
      users: [n], the user of each entry.
      resamples: how many times all users are drawn.
      level: the share of the resampled areas inside the interval.
      seed: seed of the draws.

    Returns:
      (low, high); NaN where `auc` is NaN.
    """
    if math.isnan(auc(scores, labels)):
        return math.nan, math.nan
    value, positive, user = _distinct(scores), np.asarray(labels) == 1, _distinct(users)
    rng, count = np.random.default_rng(seed), user.max() + 1
    draws = (
        np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples)
    )
    areas = [_area(value, positive, draw[user]) for draw in draws]
    # The area of a draw that lacks a class is NaN, and is left out.
    low, high = np.nanquantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def macro_f1(chosen: np.ndarray, target: np.ndarray, classes: int) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    Args:
      chosen: i [n], the chosen classes.
      target: i [n], the right classes.
      classes: number of classes.

    Returns:
      The mean; a class that is neither chosen nor right counts as 0.
    """
    right = np.bincount(target[chosen == target], minlength=classes)
    total = np.bincount(chosen, minlength=classes) + np.bincount(target, minlength=classes)
    return float((2 * right / np.maximum(total, 1)).mean())


def bootstrap_mean(
    values: ArrayLike,
    users: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The bootstrap percentile interval of a mean; it draws users with replacement.

    Args:
      values: [n].
      users: [n], the user of each value.
      groups: i64 [n], the group of each value; the mean is then over the groups' means. None: the
        mean is over the values.
      resamples: how many times all users are drawn.
      level: the share of the resampled means inside the interval.
      seed: seed of the draws.

    Returns:
      (low, high).
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
    values: ArrayLike,
    others: ArrayLike,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean difference of pairs, and its bootstrap percentile interval over the pairs.

    Args:
      values: [n]; a pair is, for instance, one seed.
      others: [n], subtracted from `values`.
      resamples: how many times the n pairs are drawn.
      level: the share of the resampled means inside the interval.
      seed: seed of the draws.

    Returns:
      (low, mean, high).
    """
    difference = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    draws = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(difference.mean()), float(high)


def _distinct(values: ArrayLike) -> np.ndarray:
    """The rank of each entry among the distinct values, i64 [n]."""
    return np.unique(np.asarray(values), return_inverse=True)[1]


def _area(value: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> float:
    """The area from ranks i64 [n], labels bool [n], weights [n]; NaN if a class is missing."""
    positives = np.bincount(value, weight * positive)
    negatives = np.bincount(value, weight * ~positive)
    pairs = positives.sum() * negatives.sum()
    won = positives @ (np.cumsum(negatives) - negatives / 2)
    return float(won / pairs) if pairs else math.nan
