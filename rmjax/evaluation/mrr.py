"""MRR: the mean reciprocal rank of the right answer, or of the better one of two."""

from __future__ import annotations

from rmjax.evaluation import Asked, Metric, best_rank, mean_metric, rank
from rmjax.registry import NoSettings as Settings


def make(settings: Settings) -> Metric:
    """Builds the metric: over all questions, of each group, and of the first right answer alone."""
    mean = mean_metric(lambda asked: 1 / best_rank(asked))

    def measure(asked: Asked) -> tuple[float, dict[str, float]]:
        value, groups = mean.measure(asked)
        alone = (1 / rank(asked.scores, asked.target))[asked.mask].mean()
        return value, groups | {"answer 1 alone": float(alone)}

    return mean._replace(measure=measure)
