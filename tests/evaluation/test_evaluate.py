"""Measures, intervals and rows of the final table, compared with counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

import rmjax
from rmjax import evaluation
from rmjax.data.source import Questions, Source
from rmjax.evaluation import metrics, scoring
from rmjax.registry import METRICS, NoSettings
from rmjax.run import evaluate
from tests import small


class Unstreamed(Source):
    """Questions without streams."""

    num_items, max_items, num_queries, positions_at_end = 9, 9, 3, True

    def __init__(self, metric: str):
        self.questions = Questions(answer="class", classes=4, metric=metric)

    def size(self, split):
        return 12

    def fetch(self, split, indices):
        raise NotImplementedError


def source(metric: str, **more):
    made = Unstreamed(metric)
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


def test_rank_is_the_place_after_sorting_and_ties_share_the_mean():
    logits = np.array([[[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0], [-np.inf, 2.0, 3.0]]])
    target = np.array([[2, 0, 1, 1]])
    np.testing.assert_array_equal(evaluation.rank(logits, target), [[2, 2, 1.5, 2]])


def test_accuracy_over_the_asked_questions_and_in_groups():
    data, groups = scored(), {"a": np.arange(36).reshape(12, 3) % 2 == 0}
    groups["none"], ids = groups["a"] & False, data["example_id"]
    got = scoring.measures(source("accuracy", groups=lambda split: groups), "test", data)
    right = data["scores"].argmax(-1) == data["target"]
    assert got.keys() == {"accuracy", "a"}
    assert got["accuracy"] == pytest.approx(right[data["query_mask"]].mean())
    inside = [right[i, j] for i, j in np.argwhere(data["query_mask"]) if groups["a"][ids[i], j]]
    assert got["a"] == pytest.approx(np.mean(inside))


def test_error_is_the_mean_over_tasks_and_less_is_better():
    data, part = scored(), np.arange(12)[:, None] % 3 + np.zeros((12, 3), int)
    tasks = {f"qa{i}": part == i for i in range(3)}
    asked = source("error", groups=lambda split: tasks)
    got = scoring.measures(asked, "test", data)
    wrong = data["scores"].argmax(-1) != data["target"]
    mask, task = data["query_mask"], part[data["example_id"]]
    errors = {f"qa{i}": wrong[mask & (task == i)].mean() for i in range(3)}
    assert got == pytest.approx({"error": np.mean([*errors.values()])} | errors)
    assert scoring.objective(asked, got) == -got["error"]
    assert scoring.objective(source("accuracy"), {"accuracy": 0.3}) == 0.3


def test_an_answer_that_is_no_class_has_reciprocal_rank_zero():
    scores, target = np.array([[[0.2, 0.5], [0.2, 0.5]]]), np.array([[2, 0]])
    np.testing.assert_array_equal(evaluation.rank(scores, target), [[np.inf, 2]])
    asked = evaluation.Asked(scores, target, np.ones((1, 2), bool))
    assert METRICS["mrr"].make(NoSettings()).measure(asked)[0] == 0.25


def test_reciprocal_rank_takes_the_better_of_two_right_answers():
    data = scored()
    also = np.where(np.arange(12)[:, None] % 2, 3, -1) + np.zeros((12, 3), int)
    got = scoring.measures(source("mrr", also=lambda split: also), "test", data)
    alone = scoring.measures(source("mrr"), "test", data)
    assert got["answer 1 alone"] == alone["answer 1 alone"] == alone["mrr"] < got["mrr"]
    by_hand = []
    for i, j in np.argwhere(data["query_mask"]):
        right = {data["target"][i, j], also[data["example_id"][i], j]} - {-1}
        logits = data["scores"][i, j]
        equal = lambda r, logits=logits: (logits == logits[r]).sum() - 1
        by_hand.append(1 / min(1 + (logits > logits[r]).sum() + equal(r) / 2 for r in right))
    assert got["mrr"] == pytest.approx(np.mean(by_hand))


def test_rows_of_the_machine_and_the_references_with_their_intervals():
    data, part = scored(n=60), np.arange(60)[:, None] % 3 + np.zeros((60, 3), int)
    answers = np.random.default_rng(1).integers(0, 4, (60, 3))
    tasks = {f"qa{i}": part == i for i in range(3)}
    truth = np.zeros((60, 3), int)
    truth[data["example_id"]] = data["target"]
    references = {"guess": answers, "truth": truth}
    asked = source("error", groups=lambda split: tasks, references=lambda split: references)
    rows = scoring.rows(asked, "test", "machine", data, np.arange(60), 0)
    assert [row["memory"] for row in rows] == ["machine", "guess", "truth"]
    assert rows[2]["test_error"] == rows[2]["high"] == 0 and rows[2]["under_5%"] == 3
    wrong = answers[data["example_id"]] != data["target"]
    of_task = data["query_mask"] & (part[data["example_id"]] == 1)
    assert rows[1]["qa1"] == pytest.approx(wrong[of_task].mean())
    for row in rows[:2]:
        assert row["low"] < row["test_error"] < row["high"] and row["under_5%"] == 0
    streams = np.arange(60) % 3  # three streams of twenty examples
    few = scoring.rows(asked, "test", "machine", data, streams, 0)
    assert few[0]["high"] - few[0]["low"] != rows[0]["high"] - rows[0]["low"]


def test_a_nan_score_makes_the_metric_nan():
    data = scored()
    row = np.argwhere(data["query_mask"])[0]
    data["scores"][tuple(row)] = np.nan
    for metric in ("accuracy", "error", "mrr"):
        assert np.isnan(scoring.measures(source(metric), "test", data)[metric])


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    """Ten equal values per user give the same width as one value per user."""
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap_mean(np.repeat(values, 10), np.repeat(np.arange(400), 10))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_a_registered_metric_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setattr(METRICS, "_registered", {})

    @rmjax.register_metric("ndcg@2")
    def make(settings):
        return evaluation.mean_metric(lambda asked: gain(evaluation.best_rank(asked)))

    def gain(ranks):
        return np.where(ranks <= 2, 1 / np.log2(1 + ranks), 0.0)

    answers, asked = scored(), source("ndcg@2")
    ranks = evaluation.rank(answers["scores"], answers["target"])[answers["query_mask"]]
    got = scoring.rows(asked, "test", "machine", answers, np.arange(12), 0)[0]
    assert got["test_ndcg@2"] == pytest.approx(gain(ranks).mean())
    assert got["low"] < got["test_ndcg@2"] < got["high"]
    assert scoring.objective(asked, {"ndcg@2": 0.3}) == 0.3
    with pytest.raises(ValueError, match="unknown metric 'ndcg@3'; did you mean 'ndcg@2'"):
        scoring.metric_of(source("ndcg@3"))


def test_a_run_may_choose_another_metric_than_that_of_its_data():
    answers, asked = scored(), source("accuracy")
    rows = scoring.rows(asked, "test", "machine", answers, np.arange(12), 0, "mrr")
    assert rows == scoring.rows(source("mrr"), "test", "machine", answers, np.arange(12), 0)
    measured = scoring.measures(asked, "test", answers, "error")
    assert scoring.objective(asked, measured, "error") == -measured["error"]
    scoring.check_metric(asked, "mrr")
    asked.references = lambda split: {"truth": answers["target"][np.argsort(answers["example_id"])]}
    rows = scoring.rows(asked, "test", "machine", answers, np.arange(12), 0, "mrr")
    assert rows[1]["test_mrr"] == 1.0
    with pytest.raises(ValueError, match="'auc' measures answers of the form click, but .* class"):
        scoring.check_metric(asked, "auc")


def test_measures_by_length_of_history_are_those_of_the_questions_in_each_part():
    data = scored(n=40) | {"items_before": np.random.default_rng(1).integers(0, 99, (40, 3))}
    lines = scoring.by_history(source("accuracy"), "test", data, parts=4)
    right, mask = data["scores"].argmax(-1) == data["target"], data["query_mask"]
    total = 0
    for line in lines:
        low, high = map(int, str(line["items before"]).split(" to "))
        inside = mask & (data["items_before"] >= low) & (data["items_before"] <= high)
        assert line["questions"] == inside.sum() and line["test accuracy"] == right[inside].mean()
        total += inside.sum()
    assert len(lines) == 4 and total == mask.sum()
    same = data | {"items_before": np.full((40, 3), 7)}
    (line,) = scoring.by_history(source("accuracy"), "test", same)
    assert line["items before"] == "7 to 7" and line["questions"] == mask.sum()


def test_items_before_a_question_are_counted_without_padding():
    made = small.batch(position=True)
    before = evaluate.items_before(made)
    for row, q in np.ndindex(*made.query.shape):
        assert before[row, q] == made.item_mask[row, : made.position[row, q]].sum()
    at_end = evaluate.items_before(small.batch())
    assert (at_end == np.asarray(small.batch().item_mask).sum((1, 2))[:, None]).all()
