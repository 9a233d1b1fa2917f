"""Metrics of ranks: against ranx 0.3.21, and against draws of sampled items one by one."""

from __future__ import annotations

import numpy as np
import pytest

from rmjax.data.source import Questions
from rmjax.evaluation import METRICS, Asked, ranking, scoring
from rmjax.registry import NoSettings
from rmjax.run import evaluate
from tests.evaluation.test_evaluate import Unstreamed

# ranx.evaluate of eight queries whose one relevant document stands at these ranks of 25.
RANKS = [1, 2, 3, 5, 6, 10, 11, 21]
RANX = {
    "hr": {1: 0.125, 5: 0.5, 10: 0.75, 20: 0.875},
    "ndcg": {1: 0.125, 5: 0.3147228201007499, 10: 0.3953818217789887, 20: 0.43024968998537994},
    "mrr": {1: 0.125, 5: 0.25416666666666665, 10: 0.2875, 20: 0.29886363636363633},
    "recall": {1: 0.125, 5: 0.5, 10: 0.75, 20: 0.875},
}
# Recall by ranx of three queries whose relevant documents stand at these ranks.
BASKETS = [[1, 6], [11], [3, 12, 25]]
RECALL = {1: 1 / 6, 5: 0.27777777777777773, 10: 0.4444444444444444, 20: 0.8888888888888888}


class Next(Unstreamed):
    """Questions whose answer is one of 200 items."""

    num_items = 200

    def __init__(self, **more):
        self.questions = Questions("kind", kinds=1, answer="item", metric="ndcg@10")
        vars(self).update(more)


def asked(ranks: np.ndarray, **more) -> Asked:
    ranks = np.asarray(ranks, float)
    return Asked(ranks, np.zeros(ranks.shape, int), np.ones(ranks.shape, bool), **more)


def test_values_are_those_of_ranx():
    made = METRICS["ndcg@10"].make(NoSettings())
    value, others = made.measure(asked(np.reshape(RANKS, (8, 1)), items=25))
    values = others | {"ndcg@10": value}
    assert len(values) == 16
    for name, by_cut in RANX.items():
        for k, expected in by_cut.items():
            assert values[f"{name}@{k}"] == pytest.approx(expected, abs=1e-12)


def test_recall_of_baskets_is_that_of_ranx():
    """Questions at one position of an example are a basket; the others of a row are not."""
    ranks, mask = np.ones((2, 5)), np.zeros((2, 5), bool)
    ranks[0, :3], mask[0, :3] = [1, 11, 6], True
    ranks[1, 2:], mask[1, 2:] = [25, 3, 12], True
    position = np.array([[4, 9, 4, 0, 0], [0, 0, 7, 7, 7]])
    questions = asked(ranks, position=position)._replace(mask=mask)
    for k, expected in RECALL.items():
        assert ranking.recall(questions, k) == pytest.approx(expected, abs=1e-12)
    made = METRICS["ndcg@10"].make(NoSettings())
    others = made.measure(questions)[1]
    assert all(others[f"recall@{k}"] == pytest.approx(RECALL[k], abs=1e-12) for k in RECALL)
    at_end = asked([[1, 6]])
    assert ranking.recall(at_end, 1) == 0.5
    assert np.isnan(ranking.recall(asked(np.ones((0, 2))), 1))


def test_baskets_are_sorted_once_for_all_values(monkeypatch):
    calls, unique = [], np.unique
    monkeypatch.setattr(np, "unique", lambda x, **kw: calls.append(x.shape) or unique(x, **kw))
    questions = asked(np.ones((2, 3)), position=np.array([[4, 9, 4], [0, 7, 7]], np.int32))
    METRICS["hr@10"].make(NoSettings()).measure(questions)
    assert calls == [(6,)]


@pytest.mark.parametrize("name", ["hr", "ndcg"])
def test_a_sampled_metric_is_the_mean_over_draws(name):
    rng, items, gain = np.random.default_rng(0), 200, ranking.GAINS[name]
    rank = np.array([1, 4, 20, 21, 150, 200])
    expected = ranking.sampled(rank, 10, items, gain)
    better = rng.integers(1, items, (20_000, ranking.SAMPLED, 1)) < rank  # of the 199 others
    drawn = gain(1 + better.sum(1), 10)
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - expected) <= 4 * error + 1e-5).all()
    assert expected[0] == 1 and expected[2] > gain(rank, 10)[2] == 0


def test_nan_ranks_make_the_metric_nan_and_infinite_ones_count_as_misses():
    made = METRICS["hr@10"].make(NoSettings())
    assert np.isnan(made.measure(asked([[1.0, np.nan]]))[0])
    assert made.measure(asked([[1.0, np.inf]]))[0] == 0.5


def test_rows_have_references_groups_intervals_and_fit_100_columns():
    rng, n = np.random.default_rng(0), 300
    ranks = np.floor(rng.exponential(8, (n, 2))) + 1
    scored = {
        "scores": ranks[:, ::-1], "target": np.zeros((n, 2), int), "query_mask": ranks > 0,
        "example_id": np.arange(n), "items_before": np.tile([3, 5], (n, 1)),
    }  # fmt: skip
    groups = {"under 20": np.arange(n)[:, None] + np.zeros((n, 2)) < 90}
    source = Next(groups=lambda split: groups, references=lambda split: {"popularity": ranks + 3})
    rows = scoring.rows(source, "test", "rehearsal", scored, np.arange(n), 0)
    assert [row["memory"] for row in rows] == ["rehearsal", "popularity"]
    by_hand = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0)
    assert rows[0]["test_ndcg@10"] == pytest.approx(by_hand.mean())
    assert rows[0]["under 20"] == pytest.approx(by_hand[:90].mean())
    assert rows[0]["low"] < rows[0]["test_ndcg@10"] < rows[0]["high"]
    assert rows[0]["recall@20"] == rows[0]["hr@20"] > rows[1]["hr@20"]
    assert scoring.objective(source, {"ndcg@10": 0.3}) == 0.3
    gains = {"memory_gain_recollection": 0.1, "memory_gain_familiarity": 0.2, "memory_spread": 0.3}
    text = evaluate.show([rows[0] | gains, rows[1]])
    assert max(map(len, text.splitlines())) <= 100
    head = text.splitlines()[0]
    assert all(name in head for name in ("test ndcg@10", "hr@10", "mrr@10", "under 20"))
    assert all(name in text for name in ("recall at 1, 5", "gain, familiarity"))
    named = scoring.rows(source, "test", "rehearsal", scored, np.arange(n), 0, "sampled_ndcg@10")
    assert "test sampled ndcg@10" in evaluate.show(named)
    assert named[0]["test_sampled_ndcg@10"] > rows[0]["test_ndcg@10"] == named[0]["ndcg@10"]
    with pytest.raises(ValueError, match="'auc' measures answers of the form click, but .* item"):
        scoring.check_metric(source, "auc")
    with pytest.raises(ValueError, match="'accuracy' measures"):
        scoring.check_metric(source, "accuracy")
