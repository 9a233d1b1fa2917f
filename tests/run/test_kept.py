"""The ids of a run's items: rows follow their ids, and other items are refused."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rmjax import tasks
from rmjax.data import make_source
from rmjax.data.source import Description, Questions
from rmjax.registry import MACHINES
from rmjax.run import evaluate, items, kept, parameters, resume, stages, training
from rmjax.run.workdir import Preemption
from rmjax.tools import probe
from tests import FIXTURES
from tests.runs import PLAIN, tiny

FIXTURE = FIXTURES / "movielens"


def clicks(folder: Path, **changes):
    """The config of a tiny run on the ratings in `folder`; it shares the teacher's item table."""
    options = dict(first=5, every=4, max_targets=3, test_fraction=0.3, valid_fraction=0.2)
    config = tiny(**PLAIN, **{"data.name": "movielens", "data.movielens": options})
    config.data.dir, config.data.cache_dir = str(folder / "ratings"), str(folder / "cache")
    config.teacher.share_items = True
    for name, value in changes.items():
        section, key = name.split(".")
        config[section][key] = value
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(FIXTURE, folder / "ratings")
    training.train(clicks(folder), folder / "run")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    copied = Path(shutil.copytree(finished, tmp_path / "copy"))
    config = copied / "run" / "config.json"
    config.write_text(config.read_text().replace(str(finished), str(copied)))
    return copied


def renumber(source, order):
    """The same ratings, with item order[i] as the i-th item."""
    other, number = copy.copy(source._source), np.argsort(order)
    other.numbering, other.popularity = other.numbering[order], other.popularity[order]
    fetch = other.fetch

    def renumbered(split, indices):
        examples = fetch(split, indices)
        ids = ("items", "query")
        return examples | {name: number[examples[name]].astype(np.int32) for name in ids}

    other.fetch = renumbered
    return other


def swap_an_id(folder):
    """Gives the first item a new id beyond all others, so the numbers of the others fall by one."""
    path = folder / "ratings" / "ratings.csv"
    rows = [line.split(",") for line in path.read_text().splitlines()]
    first = min(int(row[1]) for row in rows[1:])
    new = [[row[0], "999", *row[2:]] if row[1] == str(first) else row for row in rows]
    path.write_text("".join(",".join(row) + "\n" for row in new))
    return first


def scores(config, workdir, source):
    """Returns test scores of a model at step 0, its parameters, and the teacher's."""
    run = stages.Run(config, workdir, source, Preemption())
    stage, teacher = stages.model_stage(run), training.train_teacher(run)
    params = stages.fresh_state(run, stage, teacher).params
    mapped = stages.map_stage(run, stage)
    return evaluate.score_split(run, mapped, mapped.put(params), "test")["scores"], params, teacher


def test_ids_are_kept_with_the_run(finished):
    lines = (finished / "run" / "items.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    source = make_source(clicks(finished).data, 0)
    assert [row["index"] for row in rows] == list(range(source.num_items))
    assert [row["id"] for row in rows] == source.numbering.tolist()
    assert [row["count"] for row in rows] == source.popularity.tolist()


def test_rows_follow_their_ids_into_another_order(finished, tmp_path, caplog):
    source, run = make_source(clicks(finished).data, 0), str(finished / "run")
    order = np.random.default_rng(0).permutation(source.num_items)
    order[[0, 1]] = order[[1, 0]]
    config = clicks(finished, **{"train.start_from": run, "teacher.dir": run})
    want, params, teacher = scores(config, tmp_path, source)
    assert "rows move" not in caplog.text
    with caplog.at_level(logging.INFO, "absl"):
        got, moved, moved_teacher = scores(config, tmp_path, renumber(source, order))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(moved["machine"]["embed"], params["machine"]["embed"][order])
    np.testing.assert_array_equal(moved_teacher["embed"], teacher["embed"][order])
    count = (order != np.arange(len(order))).sum()
    for name in ("config.train.start_from", "config.teacher.dir"):
        assert f"{name} = {run!r}: {count} of {len(order)} rows move" in caplog.text
    with pytest.raises(ValueError, match="same items in another order: use another --workdir"):
        resume.check_same_config(clicks(finished), finished / "run", renumber(source, order))


def test_other_items_are_refused_with_their_ids(folder):
    first, run = swap_an_id(folder), str(folder / "run")
    count = len(make_source(clicks(folder).data, 0).numbering)
    words = rf"was trained on other items: 1 \(such as {first}\) of its {count} ids are not in "
    words += r"config.data, and 1 \(such as 999\) ids of config.data are new: use the data it was "
    words += "trained on"
    config = clicks(folder)
    for act in (training.train, training.evaluate_only):
        with pytest.raises(ValueError, match=words):
            act(config, run)
    with pytest.raises(ValueError, match=words):
        probe.measure(clicks(folder, **{"probe.steps": 2}), run)
    with pytest.raises(ValueError, match=words):
        training.trained(run)
    for name in ("train.start_from", "teacher.dir"):
        with pytest.raises(ValueError, match=f"config.{name} = .*{words}"):
            training.train(clicks(folder, **{"teacher.dir": run, name: run}), folder / "other")
    assert not (folder / "other" / "model").exists() and not (folder / "other" / "teacher").exists()


def test_runs_without_ids_continue_with_a_warning(folder, caplog):
    """Older runs kept no ids. A run with another number of items is still refused."""
    path, run = folder / "run" / "config.json", str(folder / "run")
    (folder / "run" / "items.jsonl").unlink()
    swap_an_id(folder)
    with pytest.raises(ValueError, match="items.jsonl is missing or was changed"):
        training.trained(run)
    shutil.copy(FIXTURE / "ratings.csv", folder / "ratings" / "ratings.csv")
    content = json.loads(path.read_text())
    del content["data"]["found"]["numbering"]
    path.write_text(json.dumps(content))
    config, warning = clicks(folder), "kept no item ids: only the number of items could be compared"
    rows = training.train(config, run)
    assert rows and warning in caplog.text
    caplog.clear()
    source = make_source(config.data, 0)
    config = clicks(folder, **{"train.start_from": run, "teacher.dir": run})
    scores(config, folder / "other", source)
    assert f"config.train.start_from = {run!r} {warning}" in caplog.text
    assert f"config.teacher.dir = {run!r} {warning}" in caplog.text
    content["data"]["found"]["items"] += 1
    path.write_text(json.dumps(content))
    sizes = f"data of {source.num_items + 1} items, config.data has {source.num_items}"
    with pytest.raises(ValueError, match=sizes):
        items.match_items(folder / "run", source, run)


def test_worlds_with_as_many_items_are_distinguished(tmp_path):
    """Simulated worlds may differ in their items only. Other users do not make another world."""
    made = make_source(tiny().data, 0)
    resume.check_same_config(tiny(), tmp_path, made)
    assert not (tmp_path / "items.jsonl").exists()
    assert items.match_items(tmp_path, make_source(tiny().data, 1), "a run") is None
    for changes in ({"world_seed": 1}, {"styles": 3, "items_per_style": 2}):
        changes = {f"data.simulated.{name}": value for name, value in changes.items()}
        other = make_source(tiny(**changes).data, 0)
        assert other.num_items == made.num_items
        words = "trained on items of simulated clicks, world 0: .*; config.data has"
        with pytest.raises(ValueError, match=words):
            items.match_items(tmp_path, other, "a run")
    names = []
    for seed in (0, 1):
        names.append(make_source(tiny(**{"data.name": "synthetic"}).data, seed).numbering)
    assert names[0] != names[1]


@pytest.mark.parametrize("kind", [*MACHINES, "teacher", "ranking"])
def test_all_arrays_with_rows_of_items_are_named(kind):
    """Only these follow the items into another order, see `parameters.read_start`."""
    count = 61  # no other size is equal to this
    ranks = Questions("kind", kinds=1, answer="item", metric="ndcg@10")
    questions = ranks if kind == "ranking" else Questions()
    source = Description(num_items=count, max_items=40, questions=questions)
    config = tiny(**{"machine.kind": kind} if kind in MACHINES else {})
    make = tasks.make_teacher if kind == "teacher" else tasks.make_task
    task = make(config, source)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    tables = [path for path, leaf in leaves if count in leaf.shape]
    named = [tuple(key.key for key in path) for path in tables]
    assert sorted(named) == sorted(task.item_arrays) and task.table in named


def test_a_config_with_a_number_too_large_for_a_float_is_named(tmp_path):
    values = json.loads(tiny().to_json())
    values["model"]["dropout"] = 10**400
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: int too large"):
        kept.read_config(tmp_path)


def test_a_missing_or_truncated_config_is_an_error_with_a_cure(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="is missing: name a workdir that was trained"):
        kept.read_values(path)
    (tmp_path / "model" / "000000002").mkdir(parents=True)
    words = "config.json is missing, and without it the checkpoints .*restore it from"
    with pytest.raises(FileNotFoundError, match=words):
        kept.read_values(path)
    path.write_text('{"seed"')
    words = "no whole JSON: line 1, .*; restore it from a copy of the workdir, or use an"
    with pytest.raises(ValueError, match=words):
        kept.read_values(path)


def test_damaged_checkpoints_are_not_reported_as_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "read_best", lambda *_: None)
    task = SimpleNamespace(init=lambda key: {})
    words = "has no checkpoint of the model: train first, with --mode=train"
    with pytest.raises(FileNotFoundError, match=words):
        parameters.read_model(tmp_path, task)
    (tmp_path / "model" / "000000002").mkdir(parents=True)
    words = "has no intact checkpoint of the model, see above: restore it from a"
    with pytest.raises(FileNotFoundError, match=words):
        parameters.read_model(tmp_path, task)
