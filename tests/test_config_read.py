"""No key of a config is there for nothing: some run reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmjax import tasks, train
from rmjax.config import SCHEMA, Recorder
from rmjax.data import make_source
from tests.runs import PLAIN, compilations_kept, tiny

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def kept(tmp_path):
    with compilations_kept(tmp_path / "compiled"):
        yield


def test_every_key_is_read(tmp_path):
    read = set()
    fast = {"machine.kind": "gru", "teacher.steps": 1, "train.steps": 2, "train.save_every": 1}
    run = Recorder(tiny(**fast))
    train.train(run, tmp_path / "run")
    read |= run.read
    of_other_machines = {"machine.slots", "machine.encoder", "machine.buffer_length", "reason.hops"}
    of_other_data = {"data.dir", "data.cache_dir", "data.movielens.every"}
    assert not read & (of_other_machines | of_other_data) and "machine.history_sum" in read
    for kind in ("rehearsal", "buffer"):
        config = Recorder(tiny(**{"machine.kind": kind}))
        tasks.make_task(config, make_source(config.data, 0))
        read |= config.read
    for name in ("movielens", "xlong"):
        at = {"data.name": name, "data.dir": str(FIXTURES / name), "data.cache_dir": str(tmp_path / "cache")}
        config = Recorder(tiny(**at, **{"data.movielens.first": 3, "data.movielens.every": 2}))
        assert make_source(config.data, config.data.seed).size("train") > 0
        read |= config.read
        assert ("data.movielens.max_targets" in config.read) == (name == "movielens")
    assert read == set(SCHEMA)


def test_taking_a_section_whole_reads_its_keys_and_writing_it_out_reads_none():
    config = Recorder(tiny(**PLAIN))
    assert config.to_json() == tiny(**PLAIN).to_json() and config.read == set()
    options = dict(config.data.movielens)
    assert options == tiny().data.movielens.to_dict()
    assert config.read == {f"data.movielens.{key}" for key in options}
    assert dict(**config.teacher) == tiny().teacher.to_dict() and list(config.teacher) == list(tiny().teacher)
    assert config.read == {name for name in SCHEMA if name.startswith(("data.movielens.", "teacher."))}
