"""The area under the ROC curve over all clicks of a split."""

from __future__ import annotations

import numpy as np

from rmjax.evaluation import Asked, Metric, metrics
from rmjax.registry import NoSettings as Settings


def make(settings: Settings) -> Metric:
    """Of all questions together, so that no group has its own."""

    def interval(asked: Asked, users: np.ndarray, seed: int) -> tuple[float, float]:
        return metrics.bootstrap(
            asked.scores[asked.mask], asked.target[asked.mask], users, seed=seed
        )

    return Metric(lambda asked: (metrics.auc(asked.scores, asked.target, asked.mask), {}), interval)
