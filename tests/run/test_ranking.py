"""A run on questions whose answer is an item: from training to the best items of a stream."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

import rmjax
from rmjax import config as configs
from rmjax.registry import SOURCES
from rmjax.tasks.answers import questions_only
from tests.runs import PLAIN, tiny
from tests.shop import Shop, ShopSource


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config, workdir, source and rows of a run with drawn negatives and sparse updates."""
    keys = {"ranking.question": "last", "ranking.table": "shared", "ranking.full_softmax": 10}
    keys |= {"ranking.negatives": 8, "train.sparse_items": True, "data.segment_length": 5}
    config = tiny(**PLAIN, **keys, **{"train.steps": 8, "train.learning_rate": 0.02})
    source = ShopSource(Shop(users=40, items=60, longest=30), queries=4)
    workdir = tmp_path_factory.mktemp("ranked")
    return config, workdir, source, rmjax.fit(config, workdir, source)


def test_the_table_has_the_model_and_all_baselines(run):
    _, workdir, source, rows = run
    names = ["gru", "popularity", "most recent", "co-occurrence", "nearest id"]
    assert [row["memory"] for row in rows] == names
    assert rows == json.loads((workdir / "results.json").read_text())
    for row in rows:
        assert 0 <= row["low"] <= row["test_ndcg@10"] <= row["high"] <= 1
        assert row["hr@10"] == row["recall@10"] <= row["hr@20"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    valid = [line for line in lines if line["kind"] == "model/valid" or "ndcg@10" in line]
    assert len(valid) == 2 and {"hr@10", "under 40"} <= valid[0].keys()


def test_an_opened_model_knows_the_last_item_of_its_streams(run):
    _, workdir, source, _ = run
    model = rmjax.open_model(workdir)
    assert model.description.popularity == tuple(source.popularity)
    assert model.description.questions == source.questions
    task, params, items = model.task, model.params, [3, 7, 7, 1, 9, 4, 2]
    streams = model.streams(capacity=4, queries=(1,))
    read = 0
    for part in (items[:5], items[5:6], [], items[6:]):  # the first part fills a segment
        streams.write(["ann"], [part])
        read += len(part)
        (live,) = streams.answer(["ann"], [[0]])
        memory = task.memorize(params, _batch(items[:read])).memory
        last = jnp.array([[items[read - 1]]])
        offline = task.answer(params, memory, last, jnp.ones((1, 1), bool))
        np.testing.assert_allclose(live, offline[0], atol=1e-5)
    (cold,) = streams.answer(["bob"], [[0]])
    empty = task.machine.init_memory(params["machine"], 1)
    nobody = jnp.array([[-1]]), jnp.ones((1, 1), bool)
    np.testing.assert_allclose(cold, task.answer(params, empty, *nobody)[0], atol=1e-5)
    value, ids = task.top_k(params, empty, *nobody, 3)
    np.testing.assert_array_equal(ids[0, 0], np.argsort(-cold[0])[:3])


def _batch(items: list[int]):
    length = -(-len(items) // 5) * 5
    padded = np.pad(np.array(items, np.int32), (0, length - len(items))).reshape(1, -1, 5)
    mask = (np.arange(length) < len(items)).reshape(1, -1, 5)
    batch = questions_only(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    return batch.replace(items=jnp.asarray(padded), item_mask=jnp.asarray(mask))


def test_sparse_updates_need_the_shared_table(monkeypatch):
    monkeypatch.setattr(SOURCES, "_registered", {})

    @dataclasses.dataclass(frozen=True)
    class Settings:
        ranks_items: ClassVar[bool] = True

    rmjax.register_source("next_items", Settings)(lambda settings, common, seed: None)
    config = tiny(**PLAIN, **{"data.name": "next_items"})
    assert configs.reads(config, "ranking.question")
    assert "asks for no item" in configs.why_unread(tiny(), "ranking.question")
    config.train.sparse_items = True
    with pytest.raises(ValueError, match="sparse_items: needs config.ranking.table = 'shared'"):
        configs.validate(config)
    config.ranking.table = "shared"
    configs.validate(config)
