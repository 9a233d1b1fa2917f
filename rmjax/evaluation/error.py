"""The share of questions that are answered wrong, as bAbI has it: the mean over tasks, and how many tasks fail."""

from __future__ import annotations

import numpy as np

from rmjax.evaluation import Asked, Metric, chosen, group_means, known, metrics
from rmjax.registry import NoSettings as Settings


def make(settings: Settings) -> Metric:
    """The mean of the groups' means, where there are groups."""

    def values(asked: Asked) -> np.ndarray:
        return known(asked, lambda asked: chosen(asked) != asked.target)

    def measure(asked: Asked) -> tuple[float, dict[str, float]]:
        each = group_means(asked, values(asked))
        return float(np.mean(list(each.values()) if each else values(asked)[asked.mask])), each

    def interval(asked: Asked, users: np.ndarray, seed: int) -> tuple[float, float]:
        group = (
            np.stack(list(asked.groups.values()))[:, asked.mask].argmax(0) if asked.groups else None
        )
        return metrics.bootstrap_mean(values(asked)[asked.mask], users, group, seed=seed)

    return Metric(
        measure,
        interval,
        less_is_better=True,
        summary=lambda each: (
            {"under_5%": sum(error < 0.05 for error in each.values())} if each else {}
        ),
    )
