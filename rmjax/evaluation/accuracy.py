"""Accuracy: the share of questions with the right answer."""

from __future__ import annotations

from rmjax.evaluation import Metric, chosen, mean_metric
from rmjax.registry import NoSettings as Settings


def make(settings: Settings) -> Metric:
    """Builds the metric: the accuracy over all questions, and of each group."""
    return mean_metric(lambda asked: chosen(asked) == asked.target)
