"""Error: the share of questions with a wrong answer, reported as in bAbI.

bAbI reports the mean error over tasks, and the number of tasks that fail.
"""

from __future__ import annotations

import numpy as np

from rmjax.evaluation import Asked, Metric, chosen, group_means, keep_nan, metrics
from rmjax.registry import NoSettings as Settings


def make(settings: Settings) -> Metric:
    """Builds the metric: the mean of the groups' errors, or the error of all without groups."""

    def values(asked: Asked) -> np.ndarray:
        return keep_nan(asked, lambda asked: chosen(asked) != asked.target)

    def measure(asked: Asked) -> tuple[float, dict[str, float]]:
        errors = group_means(asked, values(asked))
        mean = np.mean(list(errors.values()) if errors else values(asked)[asked.mask])
        return float(mean), errors

    def interval(asked: Asked, users: np.ndarray, seed: int) -> tuple[float, float]:
        group = None
        if asked.groups:
            group = np.stack(list(asked.groups.values()))[:, asked.mask].argmax(0)
        return metrics.bootstrap_mean(values(asked)[asked.mask], users, group, seed=seed)

    def summary(errors: dict[str, float]) -> dict[str, float]:
        return {"under_5%": sum(error < 0.05 for error in errors.values())} if errors else {}

    return Metric(measure, interval, less_is_better=True, summary=summary)
