"""The mean reciprocal rank of the right answer, or of the better of two."""

from __future__ import annotations

from rmjax.evaluation import Asked, Metric, best_rank, mean_metric, rank
from rmjax.registry import NoSettings as Settings


def make(settings: Settings) -> Metric:
    """Over all questions, and in each group; beside it that of the first right answer alone."""
    mean = mean_metric(lambda asked: 1 / best_rank(asked))

    def measure(asked: Asked) -> tuple[float, dict[str, float]]:
        whole, groups = mean.measure(asked)
        alone = (1 / rank(asked.scores, asked.target))[asked.mask].mean()
        return whole, groups | {"answer 1 alone": float(alone)}

    return mean._replace(measure=measure)
