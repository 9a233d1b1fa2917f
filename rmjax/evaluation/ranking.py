"""Metrics of the rank of the item that came next: HR@k, NDCG@k, MRR@k and recall@k.

With the rank r of the one right item among all items, where equal scores share the mean of their
ranks:

    HR@k = [r <= k]    NDCG@k = [r <= k] / log2(1 + r)    MRR@k = [r <= k] / r

Each is a mean over questions. Recall@k is a mean over baskets. The questions of an example at one
position ask for items that came together, a basket. Its value is the share of its items with
r <= k. Where every basket has one item, recall@k equals HR@k.

Sampled metrics rank the right item among itself and `SAMPLED` other items, as some papers do. They
are much higher, and order models otherwise than the metrics over all items (Krichene and Rendle
2020). Here they are expectations over uniform draws with replacement, computed from the rank r.
They take all other items for competitors, also where seen items are left out of the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from rmjax.evaluation import Asked, Metric, mean_metric
from rmjax.registry import NoSettings as Settings

CUTS = (10, 20, 5, 1)  # k of the values beside the metric, in the order of the table
SAMPLED = 100  # other items in a sampled metric


def hr(rank: np.ndarray, k: int) -> np.ndarray:
    """Whether each rank is among the first k."""
    return _gain(rank, k, lambda r: np.ones_like(r))


def ndcg(rank: np.ndarray, k: int) -> np.ndarray:
    """The discounted gain of each rank. The ideal gain of one right item is 1."""
    return _gain(rank, k, lambda r: 1 / np.log2(1 + r))


def mrr(rank: np.ndarray, k: int) -> np.ndarray:
    """The reciprocal of each rank among the first k."""
    return _gain(rank, k, lambda r: 1 / r)


def _gain(rank: np.ndarray, k: int, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The gain of ranks up to k, 0 of others, and NaN of NaN."""
    rank = np.asarray(rank, np.float64)
    inside = rank <= k
    return np.where(np.isnan(rank), np.nan, np.where(inside, gain(np.where(inside, rank, 1)), 0.0))


GAINS = {"hr": hr, "ndcg": ndcg, "mrr": mrr}


def sampled(rank: np.ndarray, k: int, items: int, gain: Callable[..., np.ndarray]) -> np.ndarray:
    """The expected gain of each rank among itself and `SAMPLED` drawn others.

    Args:
      rank: f64, ranks among all items.
      k: last rank that counts; at most `SAMPLED`.
      items: number of all items.
      gain: one of `GAINS`.

    Returns:
      f64, in the shape of `rank`.
    """
    better = np.clip((np.asarray(rank, np.float64) - 1) / max(items - 1, 1), 0, 1)
    # The number of drawn items that rank higher is binomial.
    terms = (
        math.comb(SAMPLED, j) * better**j * (1 - better) ** (SAMPLED - j) * gain(1.0 + j, k)
        for j in range(k)
    )
    return sum(terms, np.zeros(np.shape(rank)))


def recall(asked: Asked, k: int, basket: np.ndarray | None = None) -> float:
    """Recall@k, the mean over baskets; NaN without questions.

    Args:
      asked: the questions, with ranks as scores.
      k: last rank that counts.
      basket: of `baskets`, if it is known.

    Returns:
      The value.
    """
    basket = baskets(asked) if basket is None else basket
    hits, size = np.bincount(basket, hr(asked.scores, k)[asked.mask]), np.bincount(basket)
    return float((hits / size).mean()) if len(size) else math.nan


def baskets(asked: Asked) -> np.ndarray:
    """The basket of each asked question, numbered from 0, i64 [asked questions]."""
    row = np.nonzero(asked.mask)[0]
    if asked.position is None:  # all questions come after the stream, so a row is one basket
        key = row
    else:
        position = asked.position[asked.mask].astype(np.int64)
        key = row * (1 + position.max(initial=0)) + position
    return np.unique(key, return_inverse=True)[1].reshape(-1)


def _make(name: str, k: int) -> Metric:
    """A metric with the ranks as its scores, and the values of all metrics at `CUTS` beside it."""
    of_sample = name.startswith("sampled_")
    gain = GAINS[name.removeprefix("sampled_")]
    if of_sample:
        mean = mean_metric(lambda asked: sampled(asked.scores, k, asked.items, gain))
    else:
        mean = mean_metric(lambda asked: gain(asked.scores, k))

    def measure(asked: Asked) -> tuple[float, dict[str, float]]:
        value, others = mean.measure(asked)
        basket = baskets(asked)
        for cut in CUTS:
            for other, of_rank in GAINS.items():
                others[f"{other}@{cut}"] = float(of_rank(asked.scores, cut)[asked.mask].mean())
            others[f"recall@{cut}"] = recall(asked, cut, basket)
        return value, {key: of for key, of in others.items() if key != f"{name}@{k}"}

    return mean._replace(measure=measure, answers=("item",))


def _maker(name: str, k: int) -> Callable[[Settings], Metric]:
    return lambda settings: _make(name, k)


hr_10, ndcg_10, mrr_10 = (_maker(name, 10) for name in GAINS)
hr_20, ndcg_20, mrr_20 = (_maker(name, 20) for name in GAINS)
sampled_hr_10, sampled_ndcg_10 = _maker("sampled_hr", 10), _maker("sampled_ndcg", 10)
