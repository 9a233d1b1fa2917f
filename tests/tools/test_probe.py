"""Forgetting: ages are right, and a memory of the latest segment alone is recognised."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.data.pipeline import Subset
from rmjax.data.source import Source
from rmjax.evaluation.metrics import auc
from rmjax.run import training
from rmjax.tools import probe
from tests.runs import PLAIN, tiny
from tests.small import batch, noise, recommendation, rehearsal, small

FEW = {"machine.kind": "gru", "rehearsal.sampler": "uniform"}
FEW |= {"train.steps": 2, "train.eval_every": 2, "train.save_every": 1}
ONLY_RECOLLECTION = pytest.param({"rehearsal.familiarity": 0.0}, marks=pytest.mark.slow)


@pytest.mark.parametrize("changes", [PLAIN | {"probe.steps": 2}, ONLY_RECOLLECTION], ids=str)
def test_a_probe_writes_numbers_and_a_figure(tmp_path, changes):
    config = tiny(**FEW | changes | {"probe.fragments": 3, "probe.streams": 11})
    rows = training.train(config, tmp_path)
    result = probe.measure(config, tmp_path)
    assert result == json.loads((tmp_path / "probe.json").read_text())
    assert (tmp_path / "probe.png").stat().st_size > 5000
    assert result["measures"]["auc"] == pytest.approx(rows[0]["test_auc"], abs=1e-6)
    ages = [(line["from"], line["to"]) for line in result["by_age"]]
    assert ages == [(age, age) for age in range(4)]  # 40 clicks in segments of 10
    assert sum(line["fragments"] for line in result["by_age"]) == 11 * 3
    untrained = "rehearsal.familiarity" in changes and "probe.steps" not in changes
    for line in result["by_age"]:
        assert (line["familiarity"] is None) == untrained
        assert 0 <= line["recollection"] <= 1
    assert f"0.{round(1e4 * result['measures']['auc']):04d}" in probe.show(result)


def test_a_model_without_a_decoder_gets_a_cure(tmp_path):
    config = tiny(**FEW | PLAIN)
    with pytest.raises(ValueError, match="--config.probe.steps=500"):
        probe.measure(config, tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        probe.measure(tiny(**FEW | PLAIN | {"probe.steps": 1}), tmp_path)


def test_ages_are_counted_from_the_latest_segment(monkeypatch):
    """Item ids name their segment. Only the items of a stream's latest segment are recalled."""
    task = recommendation(small("gru").machine, rehearsal(fragments=6, sampler="uniform"))
    params, lengths = noise(task.init), np.array([8, 3, 1, 5])
    mask = np.tile(np.arange(8)[:, None] < lengths[:, None, None], (1, 1, 4))
    mask[3, 2] = False  # an empty segment inside: four of the five remain
    items = np.tile(np.arange(32).reshape(8, 4), (4, 1, 1))
    data = batch().replace(items=jnp.asarray(items), item_mask=jnp.asarray(mask))

    def recall(r, machine, params, cut, memory, key):
        latest = cut.items[..., :1] // 4 == lengths[:, None, None] - 1
        truth = jnp.take_along_axis(cut.items, cut.hidden_at, 2)
        recalled = jnp.where(latest[..., None], 1e3 * params["machine"]["embed"][truth], 0.0)
        return 1.0 * latest[..., 0], jnp.zeros(latest.shape[:2]), recalled

    monkeypatch.setattr(probe.rehearsing, "recall", recall)
    recalled = jax.jit(lambda: probe.recall(task, params, data, data, jax.random.key(0)))()
    recalled = jax.device_get(recalled)
    for row, segments in enumerate((8, 3, 1, 4)):
        got = {name: array[row] for name, array in recalled.items()}
        ages = got["age"][got["valid"]]
        assert len(set(ages)) == len(ages) == min(segments, 6)
        assert set(ages) <= set(range(segments))
        latest = got["valid"] & (got["age"] == 0)
        assert got["right"][latest].all()
        assert (got["positive"][got["valid"]] == (ages == 0)).all()
        assert not got["right"][got["valid"] & ~latest].any()


def test_streams_of_a_subset_are_drawn_from_all_of_the_split():
    class Lengths(Source):
        num_items, max_items, num_queries, positions_at_end = 9, 9, 1, True

        def size(self, split):
            return 1000

        def buckets(self, split):
            return np.arange(1000) // 500, [1, 2]

        def fetch(self, split, indices):
            return {"example_id": indices}

    some = Subset(Lengths(), "test", 100, 0)
    rows = some.fetch("test", np.arange(100))["example_id"]
    assert some.size("test") == 100 == len(set(rows)) and 30 < (rows < 500).sum() < 70
    np.testing.assert_array_equal(some.buckets("test")[0], rows // 500)
    other = Subset(Lengths(), "test", 100, 1).fetch("test", np.arange(100))["example_id"]
    assert (other != rows).any()
    assert Subset(Lengths(), "test", 5000, 0).size("test") == 1000


def test_others_are_of_another_stream_and_of_the_same_bucket():
    """Bucket 0 has streams of three examples; bucket 1 has one stream, which has no other."""

    class Streams(Source):
        num_items, max_items, num_queries, positions_at_end = 9, 9, 1, True

        def size(self, split):
            return 31

        def stream_id(self, split):
            return np.arange(31) // 3

        def buckets(self, split):
            return np.arange(31) // 30, [1, 2]

        def fetch(self, split, indices):
            return {"example_id": indices, "length": np.full(len(indices), 7)}

    own, others = (
        Subset(Streams(), "test", 100, 0, other).fetch("test", np.arange(31))
        for other in (False, True)
    )
    assert (own["example_id"] == np.arange(31)).all() and (own["length"] == 7).all()
    assert (others["example_id"] // 3 != np.arange(31) // 3)[:30].all()
    assert (others["example_id"][:30] < 30).all()
    assert (others["length"] == [*[7] * 30, 0]).all() and len(set(others["example_id"])) > 10


def test_the_truth_among_sampled_items_does_not_count_against_itself(monkeypatch):
    """Sampled items are the truth or far from the truth. The truth itself is recalled."""
    rehearsed = rehearsal(fragments=6, sampler="uniform", sampled_items=40)
    task = recommendation(small("gru").machine, rehearsed)
    params, data = noise(task.init), batch()

    def recall(r, machine, params, cut, memory, key):
        truth = jnp.take_along_axis(cut.items, cut.hidden_at, 2)
        table = params["machine"]["embed"]
        unit = table / jnp.linalg.norm(table, axis=1, keepdims=True)
        params["machine"]["embed"] = unit
        zeros = jnp.zeros(cut.pair.shape)
        return zeros, zeros, unit[truth]

    monkeypatch.setattr(probe.rehearsing, "recall", recall)
    got = probe.recall(task, params, data, data, jax.random.key(0))
    assert np.asarray(got["right"])[np.asarray(got["asked"])].all()


def test_lines_are_means_over_asked_items_and_over_pairs():
    rng = np.random.default_rng(0)
    recalled = {
        "age": rng.integers(0, 45, (50, 6)),
        "valid": rng.random((50, 6)) < 0.8,
        "right": rng.random((50, 6, 3)) < 0.3,
        "asked": rng.random((50, 6, 3)) < 0.7,
        "positive": rng.normal(1, 1, (50, 6)),
        "negative": rng.normal(0, 1, (50, 6)),
        "pair": rng.random((50, 6)) < 0.9,
    }
    for name in ("recollection", "familiarity"):
        recalled[f"{name}_gain"] = rng.normal(size=(50, 6))
        recalled[f"{name}_counted"] = rng.random((50, 6)) < 0.9
    lines = probe.by_age(recalled, {"recollection": True, "familiarity": True})
    assert [(line["from"], line["to"]) for line in lines][:2] == [(0, 2), (3, 5)]
    assert len(lines) == 15
    third = recalled["valid"] & (recalled["age"] // 3 == 2)
    asked, pair = recalled["asked"][third], recalled["pair"] & third
    assert lines[2]["fragments"] == third.sum()
    gain = recalled["familiarity_gain"][third & recalled["familiarity_counted"]]
    assert lines[2]["memory_gain_familiarity"] == pytest.approx(gain.mean())
    assert lines[2]["recollection"] == pytest.approx(recalled["right"][third][asked].mean())
    scores = np.concatenate([recalled["positive"][pair], recalled["negative"][pair]])
    assert lines[2]["familiarity"] == pytest.approx(auc(scores, np.repeat([1, 0], pair.sum())))


def test_a_workdir_that_cannot_be_written_gives_a_warning(tmp_path, monkeypatch, caplog):
    drawn = []
    probe.keep({"a": 1}, tmp_path, lambda: drawn.append(1))
    assert json.loads((tmp_path / "probe.json").read_text()) == {"a": 1} and drawn == [1]
    probe.keep({"a": 2}, tmp_path / "none", lambda: drawn.append(2))
    assert "probe.json and its figures are not kept: " in caplog.text and drawn == [1]
