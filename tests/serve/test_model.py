"""A model opens from its workdir alone; users bring their own data, tasks and loggers."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import rmjax
from rmjax import tasks
from rmjax.data import describe
from rmjax.data.pipeline import eval_batches
from rmjax.run import training
from rmjax.serve import export
from rmjax.tasks.sequences import LanguageModel
from tests import FIXTURES
from tests.runs import PLAIN, compilations_kept, tiny
from tests.tasks.test_sequences import SORTING, books

FAST = {"train.steps": 1, "train.eval_every": 1, "train.save_every": 1}
ASKED = dict(first=5, every=4, max_targets=3, test_fraction=0.3, valid_fraction=0.2)


@pytest.fixture(autouse=True, scope="module")
def compiled(tmp_path_factory):
    with compilations_kept(tmp_path_factory.mktemp("compiled")):
        yield


def clicks(folder):
    shutil.copytree(FIXTURES / "movielens", folder / "data")
    return tiny(**PLAIN, **FAST, **{"data.name": "movielens", "data.movielens": ASKED})


def stories(folder):
    shutil.copytree(FIXTURES / "babi" / "tasks_1-20_v1-2", folder / "data")
    (folder / "data" / "vectors.txt").write_text("mill 3.0 4.0 0.0\nwhere 0.0 0.0 5.0\n")
    babi = {"data.name": "babi", "data.babi.tasks": "1", "data.vectors": "data/vectors.txt"}
    return tiny(**PLAIN, **FAST, **babi, **{"data.buckets": 1})


def sorting(folder):
    return tiny(**SORTING | FAST | {"model.kind": "transformer"})


def texts(folder):
    config = books(folder, **FAST, **{"model.kind": "transformer", "data.text.tokenizer": "words"})
    (folder / "books").rename(folder / "data")
    return config


def answers(task, params, batch):
    """The model's numbers for a batch."""
    if isinstance(task, LanguageModel):
        return task.measure(params, task.memory(params, len(batch.items)), batch)[0]["nats"]
    return task.scores(params, batch)


@pytest.mark.parametrize("make", [clicks, stories, sorting, texts])
def test_a_model_answers_from_another_folder_without_its_data(make, tmp_path, monkeypatch):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)
    config = make(home)
    config.data.dir, config.data.cache_dir = "data", "cache"
    training.train(config, "run")
    task, params, source = training.trained("run")
    if make is texts:
        batch = next(iter(source.evaluation("test", 2)))
    else:
        sizes = {"batch_size": 4, "segment_length": config.data.segment_length}
        batch = next(eval_batches(source, "test", seed=0, **sizes))
    expected, described = answers(task, params, batch), describe(config.data, source)
    (home / "run").rename(away / "moved")
    monkeypatch.chdir(away)
    shutil.rmtree(home)
    model = rmjax.open_model("moved")
    np.testing.assert_array_equal(answers(model.task, model.params, batch), expected)
    assert model.description == described and model.vocabulary == tuple(source.vocabulary)
    assert (model.ids is None) == (make is not clicks)
    assert (described.vector_width == 3) == (make is stories)
    if make is texts:
        ids = source.splits["test"].tokenizer.encode("one and or")
        np.testing.assert_array_equal(model.tokenizer.encode("one and or"), ids)
    if make is clicks:
        np.testing.assert_array_equal(model.ids, source.numbering)
        streams = model.streams()
        streams.write(["ann"], [[1, 2, 3]])
        assert streams.answer(["ann"], [[4, 5]])[0].shape == (2,)
        export.write_export(model.task, model.params, "served")
        assert Path("served/live.py").is_file()


def test_an_older_workdir_needs_its_data_once(tmp_path):
    config, run = clicks(tmp_path), tmp_path / "run"
    config.data.dir, config.data.cache_dir = str(tmp_path / "data"), str(tmp_path / "cache")
    training.train(config, run)
    path = run / "data.json"
    kept = path.read_text()
    path.unlink()
    rmjax.open_model(run)
    assert path.read_text() == kept
    path.unlink()
    training.evaluate_only(config, run)
    assert path.read_text() == kept
    with (tmp_path / "data" / "ratings.csv").open("a") as ratings:  # a film without ratings so far
        ratings.write("1,999999,5.0,2000000000\n")
    with pytest.raises(ValueError, match="trained on other items"):
        training.trained(run)
    assert len(rmjax.open_model(run).ids) == rmjax.open_model(run).description.num_items
    path.unlink()
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="data.json is missing.*needed once.*--mode=eval"):
        rmjax.open_model(run)
    path.write_text(kept.replace('"max_items": ', '"max_items": 1'))
    message = "data.json was changed after the run wrote it: .*--mode=eval"
    with pytest.raises(ValueError, match=message):
        rmjax.open_model(run)


class Last(rmjax.Source):
    """Asks whether an item is the last one of the stream."""

    num_items, max_items, num_queries, positions_at_end = 6, 20, 2, True
    numbering = [60, 50, 40, 30, 20, 10]

    def size(self, split):
        return 12

    def fetch(self, split, indices):
        items = (np.asarray(indices)[:, None] * 7 + np.arange(20)) % 6
        last = items[:, -1:]
        return {
            "items": items.astype(np.int32),
            "length": np.full(len(items), 20, np.int32),
            "query": np.concatenate([last, (last + 1) % 6], 1).astype(np.int32),
            "query_mask": np.ones((len(items), 2), bool),
            "target": np.tile(np.array([1, 0], np.int32), (len(items), 1)),
            "example_id": np.asarray(indices, np.int32),
        }

    def references(self, split):
        return {"knows": np.tile([1.0, 0.0], (12, 1))}


class Lines(list):
    """A logger that keeps lines in a list."""

    def write(self, kind, step, values, text=None):
        self.append((kind, step, values))


def test_fit_takes_a_user_s_source_and_loggers(tmp_path, caplog):
    config, lines = tiny(**PLAIN, **FAST), Lines()
    with caplog.at_level(logging.INFO, "absl"):
        rows = rmjax.fit(config, tmp_path / "run", source=Last(), loggers=[lines])
    first = r"first step after ([\d.]+) s \(opening the data ([\d.]+) s, compilation ([\d.]+) s\)"
    ((total, opening, compiling),) = re.findall(first, caplog.text)
    assert 0 < float(compiling) <= float(total) + 0.1 - float(opening)
    assert [row["memory"] for row in rows] == ["gru", "knows"] and rows[1]["test_auc"] == 1.0
    assert {(kind, step) for kind, step, _ in lines} == {("model/train", 1), ("model/valid", 1)}
    assert rmjax.fit(config, tmp_path / "run", source=Last()) == rows
    assert training.evaluate_only(config, tmp_path / "run", Last()) == rows
    model = rmjax.open_model(tmp_path / "run")
    assert model.ids.tolist() == Last.numbering and model.description == Last().describe()
    with pytest.raises(TypeError, match="dict: make it a subclass of rmjax.Source"):
        rmjax.fit(config, tmp_path / "other", source={})
    with pytest.raises(ValueError, match="config.train.stepz: no such key"):
        config.train.stepz = 1
        rmjax.fit(config, tmp_path / "other", source=Last())


def test_fit_takes_a_user_s_task(tmp_path):
    config = tiny(**PLAIN, **FAST)
    mine = tasks.make_task(tiny(**PLAIN, **FAST, **{"machine.dim": 4}), Last())
    rmjax.fit(config, tmp_path / "run", source=Last(), task=mine)
    model = rmjax.open_model(tmp_path / "run", task=mine)
    assert model.task is mine and model.params["machine"]["embed"].shape == (6, 4)


def test_fit_refuses_what_is_no_task(tmp_path):
    with pytest.raises(TypeError, match=r"task is a dict: make it a subclass of rmjax\.Task"):
        rmjax.fit(tiny(**PLAIN), tmp_path / "run", task={})
