"""No key of a config is there for nothing: some run reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rmjax import tasks
from rmjax.config import SCHEMA, Recorder
from rmjax.data import make_source
from rmjax.registry import LANGUAGE_MODELS, LOGGERS
from rmjax.run import stages, training
from rmjax.run.workdir import Preemption
from rmjax.tools import explain, probe
from tests import FIXTURES
from tests.data.texts.test_hyperpartisan import write as articles
from tests.runs import PLAIN, compilations_kept, tiny

FOLDERS = {"babi": "babi/tasks_1-20_v1-2", "activitynet": "activitynet-qa"}


def frames(folder: Path) -> str:
    """Features of the fixture's videos."""
    folder.mkdir()
    for path in (FIXTURES / "activitynet-qa").glob("*_q.json"):
        for asked in json.loads(path.read_text()):
            np.savez(
                folder / f"{asked['video_name']}.npz",
                np.random.default_rng(0).normal(size=(7, 3)).astype("f4"),
            )
    return str(folder)


@pytest.fixture(autouse=True)
def kept(tmp_path):
    with compilations_kept(tmp_path / "compiled"):
        yield


def test_every_key_is_read(tmp_path):
    read = set()
    fast = {"machine.kind": "gru", "teacher.steps": 1, "train.steps": 2, "train.save_every": 1}
    run = Recorder(tiny(**fast))
    training.train(run, tmp_path / "run")
    read |= run.read
    of_other_machines = {"machine.slots", "machine.encoder", "machine.buffer_length"}
    of_other_data = {"data.dir", "data.cache_dir", "data.movielens.every"}
    assert not read & (of_other_machines | of_other_data) and "machine.history_sum" in read
    for kind in ("rehearsal", "continual", "buffer"):
        config = Recorder(tiny(**{"machine.kind": kind}))
        tasks.make_task(config, make_source(config.data, 0))
        read |= config.read
    for name in ("movielens", "xlong"):
        at = {
            "data.name": name,
            "data.dir": str(FIXTURES / name),
            "data.cache_dir": str(tmp_path / "cache"),
        }
        config = Recorder(tiny(**at, **{"data.movielens.first": 3, "data.movielens.every": 2}))
        assert make_source(config.data, config.data.seed).size("train") > 0
        read |= config.read
        assert ("data.movielens.max_targets" in config.read) == (name == "movielens")
    videos = frames(tmp_path / "frames")
    for name in ("synthetic", "babi", "narrativeqa", "tvqa", "activitynet"):
        at = {
            "data.name": name,
            "data.dir": str(FIXTURES / FOLDERS.get(name, name)),
            "data.babi.tasks": "1",
        }
        at |= {"data.cache_dir": str(tmp_path / "cache"), "data.activitynet.features": videos}
        world = dict(facts=20, length=40, queries=2, answers=2, groups=1)
        config = Recorder(
            tiny(**at, **{"data.synthetic": world, "reason.head": "mlp", "data.segment_length": 20})
        )
        source = make_source(config.data, config.data.seed)
        assert tasks.make_task(config, source).answers.questions == source.questions
        read |= config.read
    model = {
        "model": dict(dim=8, layers=2, heads=2),
        "memoria": dict(working=2, short_term_capacity=4),
    }
    sequences = [("sorting", kind) for kind in LANGUAGE_MODELS]
    texts = [(name, "transformer") for name in ("wikitext", "pg19", "books")]
    for name, kind in [*sequences, *texts, ("hyperpartisan", "memoria_bert")]:
        folder = str(FIXTURES / {"books": "pg19"}.get(name, name))
        if name == "hyperpartisan":
            folder = articles(tmp_path / "articles")
        at = {"data.name": name, "data.dir": folder, "data.cache_dir": str(tmp_path / "cache")}
        short = {
            "data.sorting": dict(length=20, train=8),
            "data.segment_length": 8,
            "model.kind": kind,
        }
        config = Recorder(tiny(**at, **model, **short))
        tasks.make_task(config, make_source(config.data, 0))
        read |= config.read
    config = Recorder(
        tiny(**at | {"data.name": "sorting"}, **model, **short | {"model.kind": "transformer"})
    )
    explain.report(config)
    run = stages.Run(config, tmp_path, make_source(config.data, 0), Preemption())
    stages.fresh_state(run, stages.model_stage(run))
    read |= config.read
    workdir = tmp_path / "probed"
    config = Recorder(tiny(**fast | {"train.steps": 1}))
    training.train(config, workdir)
    probe.measure(config, workdir)
    LOGGERS.settings("wandb", config.logger)
    read |= config.read
    assert read == set(SCHEMA) - {
        "machine.decay"
    }  # of a machine from outside, if another test imports it


def test_taking_a_section_whole_reads_its_keys_and_writing_it_out_reads_none():
    config = Recorder(tiny(**PLAIN))
    assert config.to_json() == tiny(**PLAIN).to_json() and config.read == set()
    options = dict(config.data.movielens)
    assert options == tiny().data.movielens.to_dict()
    assert config.read == {f"data.movielens.{key}" for key in options}
    assert dict(**config.teacher) == tiny().teacher.to_dict() and list(config.teacher) == list(
        tiny().teacher
    )
    assert config.read == {
        name for name in SCHEMA if name.startswith(("data.movielens.", "teacher."))
    }
