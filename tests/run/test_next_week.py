"""A run that starts from last week's run on a table with new items: rows follow their ids."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import rmjax
from rmjax import tasks
from rmjax.run import items, parameters, stages, training
from tests.runs import PLAIN, tiny
from tests.small import noise

KEYS = {"machine.kind": "gru", "ranking.table": "own", "data.segment_length": 4}
KEYS |= PLAIN | {"train.steps": 1, "train.eval_every": 1, "train.save_every": 1}


def week(rng, users, items, first_day):
    """Rows of events: every user has 12 of them, on days that begin with `first_day`."""
    return [
        (u, items[i], first_day + t)
        for u in range(users)
        for t, i in enumerate(rng.integers(0, len(items), 12))
    ]


def opened(rows, cache):
    user, item, time = (list(column) for column in zip(*rows, strict=True))
    events = {"user_id": user, "item_id": item, "timestamp": time}
    sizes = dict(first=4, every=4, segment_length=4, max_items=0, split="last")
    return rmjax.open_table(events, cache_dir=str(cache), **sizes)


@pytest.fixture(scope="module")
def weeks(tmp_path_factory):
    """The workdir of the first week, and the sources of both weeks."""
    folder, rng = tmp_path_factory.mktemp("weeks"), np.random.default_rng(0)
    old = [f"m{k}" for k in range(9)]
    rows = week(rng, 12, old, 0)
    first = opened(rows, folder / "cache")
    # 'a' comes before all old items, so that every index moves; 'z' has no neighbour that is old.
    rows += week(rng, 12, ["a", *old], 100)
    rows += [(99, "z", 150 + t) for t in range(12)]
    rmjax.fit(tiny(**KEYS), folder / "run", source=first)
    return folder / "run", first, opened(rows, folder / "cache")


@pytest.mark.parametrize("new_items", ["mean", "draw"])
def test_rows_follow_their_ids_and_new_ones_begin_as_asked(weeks, new_items, caplog):
    workdir, first, second = weeks
    config = tiny(**KEYS)
    task = tasks.make_task(config, second)
    fresh = noise(task.init)
    old = parameters.read_model(workdir, tasks.make_task(config, first))
    with caplog.at_level(logging.INFO, "absl"):
        new = parameters.read_start(workdir, second, task, new_items, fresh)
    assert "2 (such as a, z) ids are new" in caplog.text
    index = {one: k for k, one in enumerate(second.numbering)}
    places = [index[one] for one in first.numbering]
    events, train = second.events, np.zeros(len(second.events.items), bool)
    for begin, end in zip(events.starts[:-1], second._until, strict=True):
        train[begin:end] = True
    beside = []
    for begin, end in zip(events.starts[:-1], events.starts[1:], strict=True):
        stream = [i for i, kept in zip(range(begin, end), train[begin:end], strict=True) if kept]
        for one, other in zip(stream[:-1], stream[1:], strict=True):
            pair = events.items[one], events.items[other]
            beside += [
                b for a, b in (pair, pair[::-1]) if a == index["a"] and b not in (a, index["z"])
            ]
    assert beside
    for path in (("machine", "embed"), ("head", "embed"), ("head", "bias")):
        before, after, drawn = (tree[path[0]][path[1]] for tree in (old, new, fresh))
        np.testing.assert_array_equal(after[places], before)
        np.testing.assert_array_equal(after[index["z"]], drawn[index["z"]])
        mean = after[beside].mean(0) if new_items == "mean" else drawn[index["a"]]
        np.testing.assert_allclose(after[index["a"]], mean, rtol=1e-5, atol=1e-6)
    others = [tree["machine"]["gru"] for tree in (old, new)]
    jax.tree.map(np.testing.assert_array_equal, *others)


def test_means_of_neighbours_are_added_a_slice_of_pairs_at_a_time(monkeypatch):
    monkeypatch.setattr(items, "PAIRS", 4)
    rng, rows = np.random.default_rng(0), []

    class Table(np.ndarray):
        def __getitem__(self, index):
            rows.append(len(index))
            return np.asarray(self)[index]

    table = rng.standard_normal((9, 3)).astype(np.float32)
    one, other = rng.integers(0, 3, 10), rng.integers(4, 9, 10)
    new = np.arange(9) < 4
    means = items.mean_of_neighbours(table.view(Table), (one, other), new)
    for item in range(9):
        beside = table[other[one == item]].astype(np.float64)
        expected = beside.mean(0) if len(beside) else table[item]
        np.testing.assert_allclose(means[item], expected, rtol=1e-6)
    assert means.dtype == np.float32 and rows == [4, 4, 2]


def test_a_start_is_checked_before_training_without_its_rows(weeks, tmp_path, monkeypatch):
    workdir, _, second = weeks
    wrong = {"train.start_from": str(workdir), "train.new_items": "mean"}
    monkeypatch.setattr(second, "neighbours", lambda new: pytest.fail("neighbours were read"))
    run = stages.Run(tiny(**KEYS, **wrong), tmp_path, second, None)
    stages.check_start(run, stages.model_stage(run))
    run = dataclasses.replace(run, config=tiny(**KEYS, **wrong, **{"machine.dim": 16}))
    with pytest.raises(ValueError, match="other parameters than this config's: give both runs"):
        stages.check_start(run, stages.model_stage(run))


def test_new_items_are_refused_unless_a_key_says_how_they_begin(weeks):
    workdir, _, second = weeks
    task = tasks.make_task(tiny(**KEYS), second)
    with pytest.raises(ValueError, match=r"0 of its 9 ids .*, and 2 \(such as a, z\) .*new_items"):
        parameters.read_start(workdir, second, task)


@pytest.mark.parametrize("run", [rmjax.fit, training.evaluate_only])
def test_a_run_does_not_go_on_with_new_items_and_is_not_tested_on_them(weeks, run):
    workdir, first, second = weeks
    with pytest.raises(ValueError, match=r"2 \(such as a, z\) .* are new: .*train.start_from"):
        run(tiny(**KEYS), workdir, second)
    assert run(tiny(**KEYS), workdir, first)[0]["memory"] == "gru"


def test_ids_of_another_form_are_refused_and_few_common_ones_are_warned_of(
    tmp_path, monkeypatch, caplog
):
    kept = SimpleNamespace(numbering=np.arange(1, 9), num_items=8, popularity=None, vocabulary=())
    (tmp_path / "items.jsonl").write_text(items.item_lines(kept))
    about = {"items": 8, **items.numbering_digest(kept)}
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(items, "read_config", lambda workdir: (None, about))
    matched = lambda ids: items.match_items(
        tmp_path, SimpleNamespace(**vars(kept) | {"numbering": ids}), "start_from", "mean"
    )
    texts = np.array([*"12345678", "x"], object)
    with pytest.raises(
        ValueError, match=r"the run's ids are like 1, those of config.data like '1'"
    ):
        matched(texts)
    assert matched(np.array([1, 2, 3, *range(20, 30)])).tolist() == [0, 1, 2] + [-1] * 10
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "only 3 of its 8 ids" in caplog.text
    caplog.clear()
    assert (matched(np.arange(1, 30))[:8] == range(8)).all() and (
        matched(np.arange(1, 3)) >= 0
    ).all()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_second_week_trains_from_the_first(weeks, tmp_path):
    workdir, _, second = weeks
    config = tiny(**KEYS, **{"train.start_from": str(workdir), "train.new_items": "mean"})
    assert rmjax.fit(config, tmp_path / "run", source=second)[0]["memory"] == "gru"
    assert rmjax.open_model(tmp_path / "run").recommend(["m1", "a", "m2"], k=2)
