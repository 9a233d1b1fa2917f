"""Measures, intervals and rows of the final table, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

import rmjax
from rmjax import evaluation
from rmjax.data.source import Questions, Source
from rmjax.evaluation import metrics, scoring
from rmjax.registry import METRICS


class Asked(Source):
    """Questions without streams."""

    num_items, max_items, num_queries, positions_at_end = 9, 9, 3, True

    def __init__(self, metric: str):
        self.questions = Questions(answer="class", classes=4, metric=metric)

    def size(self, split):
        return 12

    def fetch(self, split, indices):
        raise NotImplementedError


def source(metric: str, **more):
    made = Asked(metric)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def scored(seed: int = 0, n: int = 12, q: int = 3, classes: int = 4):
    rng = np.random.default_rng(seed)
    return {
        "scores": rng.normal(size=(n, q, classes)).round(1),
        "target": rng.integers(0, classes, (n, q)),
        "query_mask": rng.random((n, q)) < 0.7,
        "example_id": rng.permutation(n),
    }


def test_ranks_are_those_of_sorting_and_equals_share_the_middle():
    logits = np.array([[[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0], [-np.inf, 2.0, 3.0]]])
    target = np.array([[2, 0, 1, 1]])
    np.testing.assert_array_equal(evaluation.rank(logits, target), [[2, 2, 1.5, 2]])


def test_accuracy_is_a_share_of_the_asked_questions_and_groups_have_their_own():
    found, groups = scored(), {"a": np.arange(36).reshape(12, 3) % 2 == 0}
    groups["none"], its = groups["a"] & False, found["example_id"]
    got = scoring.measures(source("accuracy", groups=lambda split: groups), "test", found)
    right = (found["scores"].argmax(-1) == found["target"])[found["query_mask"]]
    assert got.keys() == {"accuracy", "a"} and got["accuracy"] == pytest.approx(right.mean())
    right = found["scores"].argmax(-1) == found["target"]
    inside = [right[i, j] for i, j in np.argwhere(found["query_mask"]) if groups["a"][its[i], j]]
    assert got["a"] == pytest.approx(np.mean(inside))


def test_error_is_the_mean_over_tasks_and_less_of_it_is_better():
    found, part = scored(), np.arange(12)[:, None] % 3 + np.zeros((12, 3), int)
    tasks = {f"qa{i}": part == i for i in range(3)}
    its = source("error", groups=lambda split: tasks)
    got = scoring.measures(its, "test", found)
    wrong = found["scores"].argmax(-1) != found["target"]
    each = [wrong[found["query_mask"] & (part[found["example_id"]] == i)].mean() for i in range(3)]
    assert got == pytest.approx(
        {"error": np.mean(each)} | {f"qa{i}": error for i, error in enumerate(each)}
    )
    assert scoring.objective(its, got) == -got["error"]
    assert scoring.objective(source("accuracy"), {"accuracy": 0.3}) == 0.3


def test_reciprocal_rank_takes_the_better_of_two_right_answers():
    found = scored()
    also = np.where(np.arange(12)[:, None] % 2, 3, -1) + np.zeros((12, 3), int)
    got = scoring.measures(source("mrr", also=lambda split: also), "test", found)
    alone = scoring.measures(source("mrr"), "test", found)
    assert got["answer 1 alone"] == alone["answer 1 alone"] == alone["mrr"] < got["mrr"]
    by_hand = []
    for i, j in np.argwhere(found["query_mask"]):
        right = {found["target"][i, j], also[found["example_id"][i], j]} - {-1}
        logits = found["scores"][i, j]
        places = [
            1 + (logits > logits[r]).sum() + ((logits == logits[r]).sum() - 1) / 2 for r in right
        ]
        by_hand.append(1 / min(places))
    assert got["mrr"] == pytest.approx(np.mean(by_hand))


def test_rows_have_the_machine_then_other_readers_with_intervals_that_hold_their_means():
    found, part = scored(n=60), np.arange(60)[:, None] % 3 + np.zeros((60, 3), int)
    answers = np.random.default_rng(1).integers(0, 4, (60, 3))
    tasks = {f"qa{i}": part == i for i in range(3)}
    its = source(
        "error",
        groups=lambda split: tasks,
        references=lambda split: {"guess": answers, "truth": truth},
    )
    truth = np.zeros((60, 3), int)
    truth[found["example_id"]] = found["target"]
    rows = scoring.rows(its, "test", "machine", found, np.arange(60), 0)
    assert [row["memory"] for row in rows] == ["machine", "guess", "truth"]
    assert rows[2]["test_error"] == rows[2]["high"] == 0 and rows[2]["under_5%"] == 3
    guessed = answers[found["example_id"]] != found["target"]
    assert rows[1]["qa1"] == pytest.approx(
        guessed[found["query_mask"] & (part[found["example_id"]] == 1)].mean()
    )
    for row in rows[:2]:
        assert row["low"] < row["test_error"] < row["high"] and row["under_5%"] == 0
    few = scoring.rows(
        its, "test", "machine", found, np.arange(60) % 3, 0
    )  # three streams of twenty examples
    assert few[0]["high"] - few[0]["low"] != rows[0]["high"] - rows[0]["low"]


def test_a_score_that_is_no_number_is_no_answer():
    found = scored()
    row = np.argwhere(found["query_mask"])[0]
    found["scores"][tuple(row)] = np.nan
    for metric in ("accuracy", "error", "mrr"):
        assert np.isnan(scoring.measures(source(metric), "test", found)[metric])


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    """Users of ten equal values each: as wide as for one value a user."""
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap_mean(np.repeat(values, 10), np.repeat(np.arange(400), 10))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_a_metric_from_outside_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setattr(METRICS, "_registered", {})

    @rmjax.register_metric("ndcg@2")
    def make(settings):
        return evaluation.mean_metric(lambda asked: gain(evaluation.best_rank(asked)))

    def gain(ranks):
        return np.where(ranks <= 2, 1 / np.log2(1 + ranks), 0.0)

    answers, asked = scored(), source("ndcg@2")
    ranks = evaluation.rank(answers["scores"], answers["target"])[answers["query_mask"]]
    got = scoring.rows(asked, "test", "machine", answers, np.arange(12), 0)[0]
    assert (
        got["test_ndcg@2"] == pytest.approx(gain(ranks).mean())
        and got["low"] < got["test_ndcg@2"] < got["high"]
    )
    assert scoring.objective(asked, {"ndcg@2": 0.3}) == 0.3
    with pytest.raises(ValueError, match="unknown metric 'ndcg@3'; did you mean 'ndcg@2'"):
        scoring.metric_of(source("ndcg@3"))
