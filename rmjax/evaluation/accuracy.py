"""The share of questions that are answered right."""

from __future__ import annotations

from rmjax.evaluation import Metric, chosen, mean_metric
from rmjax.registry import NoSettings as Settings


def make(settings: Settings) -> Metric:
    """Over all questions, and in each group."""
    return mean_metric(lambda asked: chosen(asked) == asked.target)
