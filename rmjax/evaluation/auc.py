"""AUC: the area under the ROC curve over all clicks of a split."""

from __future__ import annotations

import numpy as np

from rmjax.evaluation import Asked, Metric, metrics
from rmjax.registry import NoSettings as Settings


def make(settings: Settings) -> Metric:
    """Builds the metric: one area over all questions together, none of the groups."""

    def measure(asked: Asked) -> tuple[float, dict[str, float]]:
        return metrics.auc(asked.scores, asked.target, asked.mask), {}

    def interval(asked: Asked, users: np.ndarray, seed: int) -> tuple[float, float]:
        scores, target = asked.scores[asked.mask], asked.target[asked.mask]
        return metrics.bootstrap(scores, target, users, seed=seed)

    return Metric(measure, interval, answers=("click",))
