"""Every key of a config is read by some run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rmjax import tasks
from rmjax.config import SCHEMA, Recorder, outside_keys
from rmjax.data import make_source
from rmjax.registry import LANGUAGE_MODELS, LOGGERS, MACHINES, SCHEDULES
from rmjax.run import stages, training
from rmjax.run.workdir import Preemption
from rmjax.tools import explain, probe
from tests import FIXTURES
from tests.data.texts.test_hyperpartisan import write as articles
from tests.runs import PLAIN, compilations_kept, tiny
from tests.shop import Shop, ShopSource

FOLDERS = {
    "babi": "babi/tasks_1-20_v1-2",
    "activitynet": "activitynet-qa",
    "books": "pg19",
}
FAST = {"machine.kind": "gru", "teacher.steps": 1, "train.steps": 2, "train.save_every": 1}
MODEL = {"model": dict(dim=8, layers=2, heads=2), "memoria": dict(working=2, short_term_capacity=4)}


def frames(folder: Path) -> str:
    """Writes features of the fixture's videos; returns their folder."""
    folder.mkdir()
    for path in (FIXTURES / "activitynet-qa").glob("*_q.json"):
        for asked in json.loads(path.read_text()):
            features = np.random.default_rng(0).normal(size=(7, 3)).astype("f4")
            np.savez(folder / f"{asked['video_name']}.npz", features)
    return str(folder)


@pytest.fixture(autouse=True)
def kept(tmp_path):
    with compilations_kept(tmp_path / "compiled"):
        yield


def data_of(name: str, tmp_path: Path) -> dict[str, object]:
    """Keys that make a config read a source's fixture."""
    return {
        "data.name": name,
        "data.dir": str(FIXTURES / FOLDERS.get(name, name)),
        "data.cache_dir": str(tmp_path / "cache"),
    }


def read_by_training(tmp_path: Path) -> set[str]:
    run = Recorder(tiny(**FAST))
    training.train(run, tmp_path / "run")
    of_other_machines = {"machine.slots", "machine.encoder", "machine.buffer_length"}
    of_other_data = {"data.dir", "data.cache_dir", "data.movielens.every"}
    assert not run.read & (of_other_machines | of_other_data)
    assert "machine.history_sum" in run.read
    return run.read


def read_by_machines() -> set[str]:
    read = set()
    # Other tests may register machines from outside.
    for kind in (k for k in MACHINES if MACHINES[k].settings.__module__.startswith("rmjax.")):
        config = Recorder(tiny(**{"machine.kind": kind}))
        tasks.make_task(config, make_source(config.data, 0))
        read |= config.read
    return read


def read_by_clicks(tmp_path: Path) -> set[str]:
    read, few = set(), {"data.movielens.first": 3, "data.movielens.every": 2}
    few |= {"data.table.path": str(FIXTURES / "movielens" / "ratings.csv"), "data.table.first": 10}
    few |= {"data.table.user": "userId", "data.table.item": "movieId"}
    for name in ("movielens", "table", "xlong"):
        config = Recorder(tiny(**data_of(name, tmp_path), **few))
        assert make_source(config.data, config.data.seed).size("train") > 0
        read |= config.read
        assert ("data.movielens.max_targets" in config.read) == (name == "movielens")
    asks_items = Recorder(tiny(**{"ranking.full_softmax": 0, "teacher.share_items": True}))
    tasks.make_task(asks_items, ShopSource(Shop(users=2, items=5)))
    read |= asks_items.read
    return read


def read_by_stories(tmp_path: Path) -> set[str]:
    read = set()
    keys = {
        "data.babi.tasks": "1",
        "data.activitynet.features": frames(tmp_path / "frames"),
        "data.synthetic": dict(facts=20, length=40, queries=2, answers=2, groups=1),
        "data.segment_length": 20,
        "reason.head": "mlp",
    }
    for name in ("synthetic", "recall", "babi", "narrativeqa", "tvqa", "activitynet", "stories"):
        config = Recorder(tiny(**data_of(name, tmp_path), **keys))
        source = make_source(config.data, config.data.seed)
        assert tasks.make_task(config, source).answers.questions == source.questions
        read |= config.read
    return read


def read_by_sequence_models(tmp_path: Path) -> set[str]:
    read = set()
    sorting = [("sorting", kind) for kind in LANGUAGE_MODELS]
    texts = [(name, "transformer") for name in ("wikitext", "pg19", "books")]
    short = {"data.sorting": dict(length=20, train=8), "data.segment_length": 8}
    for name, kind in [*sorting, *texts, ("hyperpartisan", "memoria_bert")]:
        data = data_of(name, tmp_path)
        if name == "hyperpartisan":
            data["data.dir"] = articles(tmp_path / "articles")
        config = Recorder(tiny(**data, **MODEL, **short, **{"model.kind": kind}))
        tasks.make_task(config, make_source(config.data, 0))
        read |= config.read
    data = data_of("sorting", tmp_path)
    config = Recorder(tiny(**data, **MODEL, **short, **{"model.kind": "transformer"}))
    explain.report(config)
    run = stages.Run(config, tmp_path, make_source(config.data, 0), Preemption())
    stages.fresh_state(run, stages.model_stage(run))
    return read | config.read


def read_by_a_probe(tmp_path: Path) -> set[str]:
    config = Recorder(tiny(**FAST | {"train.steps": 1}))
    training.train(config, tmp_path / "probed")
    probe.measure(config, tmp_path / "probed")
    again = Recorder(tiny(**FAST | {"train.start_from": str(tmp_path / "probed")}))
    run = stages.Run(again, tmp_path, make_source(again.data, 0), Preemption())
    stages.check_start(run, stages.model_stage(run))
    return config.read | again.read


def test_every_key_is_read(tmp_path):
    read = read_by_training(tmp_path) | read_by_machines() | read_by_clicks(tmp_path)
    read |= read_by_stories(tmp_path) | read_by_sequence_models(tmp_path)
    read |= read_by_a_probe(tmp_path)
    config = Recorder(tiny())
    for kind in LOGGERS:
        LOGGERS.settings(kind, config.logger)
    for kind in SCHEDULES:
        SCHEDULES.settings(kind, getattr(config, "schedule", {}))
    assert read | config.read == set(SCHEMA) - outside_keys()


def test_copying_a_section_reads_its_keys_and_writing_json_reads_none():
    config = Recorder(tiny(**PLAIN))
    assert config.to_json() == tiny(**PLAIN).to_json() and config.read == set()
    options = dict(config.data.movielens)
    assert options == tiny().data.movielens.to_dict()
    assert config.read == {f"data.movielens.{key}" for key in options}
    assert dict(**config.teacher) == tiny().teacher.to_dict()
    assert list(config.teacher) == list(tiny().teacher)
    sections = ("data.movielens.", "teacher.")
    assert config.read == {name for name in SCHEMA if name.startswith(sections)}
