"""Registries: kinds of the package and from outside it, their keys, and the keys that a run reads.

Kinds from outside are registered, listed, made, and trained by the command line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmjax
from rmjax import command_line, machines, tasks
from rmjax import config as configs
from rmjax.data import make_source
from rmjax.data.texts.sorting import Sorting
from rmjax.registry import (
    CLASSIFIERS,
    LANGUAGE_MODELS,
    LOGGERS,
    MACHINES,
    SCHEDULES,
    SOURCES,
    TASKS,
    Registry,
    at_least,
    fields_of,
    setting,
)
from tests import ROOT, decayed
from tests.runs import PLAIN, tiny


@pytest.mark.parametrize("name", MACHINES)
def test_every_field_has_a_default_in_range_and_a_meaning(name):
    for field in fields_of(MACHINES[name].settings).values():
        assert field.doc and field.check.holds(field.default)
    MACHINES.settings(name, {})


@pytest.mark.parametrize(
    "registries", [[MACHINES], [LANGUAGE_MODELS, CLASSIFIERS], [SCHEDULES], [LOGGERS]]
)
def test_kinds_share_keys_with_one_default_and_one_range(registries):
    owners = {}  # {key: {(default, range): kinds}}
    for kind, value in (item for registry in registries for item in registry.items()):
        for key, field in fields_of(value.settings).items():
            meant = owners.setdefault(key, {})
            meant.setdefault((field.default, field.check.text), []).append(kind)
    assert not {key: meant for key, meant in owners.items() if len(meant) > 1}


def test_a_registered_kind_has_its_keys_in_the_schema():
    assert configs.SCHEMA["machine.decay"].default == 0.99
    assert "decayed" in configs.SCHEMA["machine.kind"].check.text
    config = tiny(**{"machine.kind": "decayed", "machine.decay": 0.5})
    assert MACHINES.settings("decayed", config.machine) == decayed.Settings(8, 0.5)
    wrong = r"config\.machine\.decay = 1\.5: must be a number, above 0 and below 1"
    with pytest.raises(ValueError, match=wrong):
        tiny(**{"machine.kind": "decayed", "machine.decay": 1.5})


def test_a_registered_source_has_a_section_in_data(monkeypatch, capsys):
    """It has flags with ranges, a name in the list, and a reader, as a source of ours has."""
    monkeypatch.setattr(SOURCES, "_registered", {})

    @dataclasses.dataclass(frozen=True)
    class Settings:
        streams: int = rmjax.setting(5, rmjax.at_least(1), "streams of each split")

    @rmjax.register_source("mine", Settings)
    def make(settings, common, seed):
        return Sorting(length=common.segment_length, train=settings.streams, seed=seed)

    config = tiny(**{"data.name": "mine", "data.mine.streams": 7})
    source = make_source(config.data, 3)
    assert (source.size("train"), source.length, source.seed) == (7, 10, 3)
    assert not configs.is_sequence(config)
    assert configs.reads(config, "data.mine.streams")
    assert not configs.reads(config, "data.babi.tasks")
    wrong = r"config\.data\.mine\.streams = 0: must be a whole number, at least 1"
    with pytest.raises(ValueError, match=wrong):
        tiny(**{"data.name": "mine", "data.mine.streams": 0})
    with pytest.raises(SystemExit):
        command_line.answer_list(["main", "--list=data.mine"])
    assert "--config.data.mine.streams=5  streams of each split" in capsys.readouterr().out


@pytest.mark.parametrize("name", SOURCES)
def test_every_key_of_a_source_has_a_default_in_range_and_a_meaning(name):
    for field in fields_of(SOURCES[name].settings).values():
        assert field.doc and field.check.holds(field.default)
    assert SOURCES.task_of(name) in TASKS


def test_an_unknown_task_of_a_source_is_an_error(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        task = "question"

    monkeypatch.setattr(SOURCES, "_registered", {})
    rmjax.register_source("mine", Settings)(lambda *_: None)
    with pytest.raises(ValueError, match="data 'mine': Settings.task = 'question': must be one of"):
        SOURCES.task_of("mine")


def test_what_cannot_be_registered():
    registry = Registry("thing", {"gru": "rmjax.machines.gru"})

    @dataclasses.dataclass(frozen=True)
    class Bare:
        dim: int = 3

    @dataclasses.dataclass(frozen=True)
    class Other:
        dim: int = rmjax.setting(3, rmjax.at_least(1), "width")

    with pytest.raises(ValueError, match="there is a thing 'gru' already"):
        registry.register("gru", Other)
    with pytest.raises(
        ValueError, match=r"Bare\.dim: give it a default with rmjax\.registry\.setting"
    ):
        registry.register("bare", Bare)
    default = (
        r"thing 'other' \(tests\.test_registry\): config\.thing\.dim has the default 3, "
        r"and 64 in 'gru' \(rmjax\.machines\.gru\)"
    )
    with pytest.raises(ValueError, match=default):
        registry.register("other", Other)
    with pytest.raises(ValueError, match="unknown thing 'gur'; did you mean 'gru'"):
        registry["gur"]


def test_options_of_make_are_checked():
    unknown = "machine 'gru' has no option 'slots'; there are dim, history_sum"
    with pytest.raises(ValueError, match=unknown):
        machines.make("gru", 10, slots=3)
    wrong = "normalize = 'both': must be a string, one of slots, items"
    with pytest.raises(ValueError, match=wrong):
        machines.make("rehearsal", 10, normalize="both")


@pytest.mark.parametrize(
    "changes, name, read",
    [
        ({}, "machine.slots", True),
        ({"machine.kind": "gru"}, "machine.slots", False),
        ({"machine.kind": "gru"}, "machine.history_sum", True),
        ({"machine.kind": "gru"}, "machine.block", True),
        ({"data.name": "xlong"}, "data.simulated.visit", True),
        ({"data.name": "xlong", "data.dir": "x"}, "data.simulated.visit", False),
        ({"data.name": "table"}, "data.table.hold_out", False),
        ({"data.name": "table", "data.table.split": "last"}, "data.table.hold_out", True),
        ({"data.name": "table", "data.table.ask": "pairs"}, "data.table.negatives", True),
        ({"data.name": "table"}, "ranking.bias", True),
        ({"data.name": "table", "data.table.ask": "pairs"}, "ranking.bias", False),
        ({"data.name": "books"}, "data.text.aligned", True),
        ({"data.name": "books"}, "data.babi.tasks", False),
        ({"data.name": "books"}, "machine.dim", False),
        ({"data.name": "books", "model.kind": "transformer"}, "memoria.working", False),
        ({}, "model.dim", False),
        ({}, "train.steps", True),
        ({}, "reason.hops", True),
        ({"machine.kind": "gru"}, "reason.hops", False),
        ({"machine.kind": "directly_reason"}, "reason.hops", False),
        ({"machine.kind": "gru"}, "machine.heads", True),  # by the rehearsal's decoder
        (PLAIN, "machine.heads", False),
        (PLAIN, "rehearsal.layers", False),
        (PLAIN | {"probe.steps": 5}, "rehearsal.layers", True),
        (PLAIN, "rehearsal.recollection", True),
        (PLAIN, "teacher.steps", False),
        (PLAIN | {"teacher.share_items": True}, "teacher.steps", True),
        ({"rehearsal.sampler": "uniform"}, "teacher.steps", False),
        ({"rehearsal.sampler": "uniform"}, "teacher.share_items", True),
        ({}, "teacher.train_items", False),
        (PLAIN | {"teacher.share_items": True}, "teacher.train_items", True),
        ({"teacher.dir": "runs/a"}, "teacher.steps", False),
        ({"teacher.dir": "runs/a"}, "teacher.dim", True),
        (PLAIN | {"teacher.dir": "runs/a"}, "teacher.dir", True),
        ({}, "train.split_layers", False),
        ({"train.mapping": "mesh"}, "train.split_layers", True),
        ({}, "data.segments", False),
        ({"data.name": "books"}, "data.segments", True),
        ({"data.name": "sorting"}, "data.segments", False),
        ({"data.name": "books"}, "data.text.held_out", True),
        ({"data.name": "books"}, "data.text.train_share", False),
        ({"data.name": "pg19"}, "data.text.train_share", True),
        ({"data.name": "books"}, "train.metric", False),
        ({}, "train.metric", True),
    ],
)
def test_which_keys_a_run_reads(changes, name, read):
    assert configs.reads(tiny(**changes), name) == read


@pytest.mark.parametrize(
    "changes",
    [{}, PLAIN, {"rehearsal.sampler": "uniform"}, PLAIN | {"teacher.share_items": True}],
)
def test_teacher_keys_are_read_where_a_teacher_is_made(changes):
    config = tiny(**changes)
    teacher = tasks.make_teacher(config, make_source(config.data, 0))
    assert configs.reads(config, "teacher.steps") == (teacher is not None)


def test_a_key_that_does_not_exist_is_not_read_and_is_an_error():
    with pytest.raises(ValueError, match=r"config\.trian\.steps: no such key"):
        configs.reads(tiny(), "trian.steps")


def test_flags_for_unread_keys_are_refused(tmp_path):
    config = tiny(**{"machine.kind": "gru", "machine.slots": 3, "reason.hops": 2})
    for key, value in (("machine.slots", 3), ("reason.hops", 2)):
        flag = f"--config.{key}={value}"
        wrong = (
            rf"config\.{key} = {value}: .* since config\.machine\.kind = 'gru': leave the flag out"
        )
        with pytest.raises(ValueError, match=wrong):
            command_line.refuse_unread(config, ["main.py", flag])
        (tmp_path / "flags").write_text(f"{flag}\n")
        with pytest.raises(ValueError, match=wrong):
            command_line.refuse_unread(config, ["main.py", f"--flagfile={tmp_path / 'flags'}"])
        command_line.refuse_unread(tiny(), ["main.py", flag])


OWN = {"machine.reader": "own"}


@pytest.mark.parametrize(
    ("kind", "changes", "key", "why"),
    [
        ("gru", {}, "reason.hops", "config.machine.kind = 'gru'"),
        ("titans", {}, "reason.hops", "config.machine.kind = 'titans'"),
        ("titans", {"machine.depth": 1}, "machine.expand", "config.machine.depth = 1"),
        ("gru", {}, "reason.mix", "config.machine.kind = 'gru'"),
        ("hpmn", OWN, "reason.norm", "config.machine.reader = 'own'"),
        ("rehearsal", {}, "reason.norm", "config.reason.hops = 1"),
        ("rehearsal", {"reason.hops": 2}, "reason.norm", ""),
        ("stm", {}, "reason.mix", ""),
        ("stm", {}, "reason.hops", ""),
        ("stm", OWN, "reason.hops", "config.machine.reader = 'own'"),
        ("mimn", OWN, "reason.hops", "config.machine.reader = 'own'"),
        ("hpmn", OWN, "reason.hops", ""),
        ("rehearsal", {"machine.encoder": "bigru"}, "machine.layers", "encoder = 'bigru'"),
        ("rehearsal", {"machine.encoder": "bigru"}, "machine.dropout", ""),
        ("dmsdnc", {"machine.refresh_rate": 0.0}, "machine.refresh_all", "refresh_rate = 0.0"),
        ("nutm", {"machine.programs": 1}, "machine.key_similarity", "programs = 1"),
        ("nutm", {"machine.programs": 1}, "machine.loss", "no loss of its own"),
        ("mimn", {"machine.utilization": 0.0}, "machine.loss", "no loss of its own"),
        ("mimn", {}, "machine.loss", ""),
        ("gru", {}, "machine.loss", "this 'gru' machine has no loss of its own"),
    ],
)
def test_keys_that_the_settings_of_a_machine_leave_unread(kind, changes, key, why):
    config = configs.base()
    config.update_from_flattened_dict({"machine.kind": kind} | changes)
    reason = configs.why_unread(config, key)
    assert why in reason if why else not reason


def test_a_config_file_may_set_keys_that_are_not_read(caplog):
    config = tiny(**{"machine.kind": "gru", "machine.slots": 3, "reason.hops": 2})
    for check in (command_line.refuse_unread, command_line.warn_of_unread):
        check(config, ["main.py", "--config.machine.kind=gru"])
    assert not caplog.text


def test_one_warning_names_all_flags_that_a_row_of_a_table_does_not_read(caplog):
    config = tiny(**{"machine.kind": "gru", "machine.slots": 3, "reason.hops": 2})
    flags = ["--config.machine.slots=3", "--config.reason.hops=2", "--config.machine.kind=gru"]
    command_line.warn_of_unread(config, ["main.py", *flags])
    (warning,) = caplog.messages
    assert warning == (
        "This run does not read config.machine.slots = 3, config.reason.hops = 2 "
        "(since config.machine.kind = 'gru')."
    )


def main(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "rmjax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)


def test_the_keys_of_a_section_are_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.answer_list(["main", "--list=train"])
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("--config.train.steps=") for line in shown)
    assert all(line.startswith("--config.train.") for line in shown)
    with pytest.raises(
        SystemExit, match="no such kind or section.*sections are seed, data, data.s"
    ):
        command_line.answer_list(["main", "--list=nothing.alike"])


def test_kinds_are_listed():
    done = main("--import=tests.decayed", "--list")
    assert done.returncode == 0 and "machine: rehearsal, continual, gru" in done.stdout
    assert "decayed" in done.stdout
    done = main("--import", "tests.decayed", "--list=machine.decayed")
    assert done.returncode == 0 and "--config.machine.decay=0.99  decayed: factor" in done.stdout
    done = main("--list=machine.rehersal")
    assert done.returncode == 1 and "did you mean machine.rehearsal?" in done.stderr
    done = main("--import=no_such.module", "--list")
    assert done.returncode == 1 and "--import=no_such.module: No module named" in done.stderr
    assert "PYTHONPATH" in done.stderr


def test_the_list_of_a_kind_has_the_shared_keys_that_it_reads(capsys):
    listed = {}
    for kind in ("model.transformer", "model.memoria", "machine.rehearsal", "machine.nutm"):
        with pytest.raises(SystemExit):
            command_line.answer_list(["main.py", f"--list={kind}"])
        printed = capsys.readouterr().out
        listed[kind] = re.findall(r"^--config\.(\S+?)=", printed, re.MULTILINE)
    plain, memoria = set(listed["model.transformer"]), set(listed["model.memoria"])
    rules = {key for key in configs.SCHEMA if key.startswith("memoria.")}
    assert "model.pretrained" in plain and "model.kind" not in plain
    assert len(rules) > 10 and memoria == plain | rules
    assert "machine.block" in listed["machine.rehearsal"]
    assert "machine.loss" not in listed["machine.rehearsal"]
    assert "machine.loss" in listed["machine.nutm"]


def test_a_machine_from_outside_trains_by_the_command_line(tmp_path):
    sizes = {
        **{f"data.synthetic.{split}": 2 for split in ("train", "valid", "test")},
        **{"train.steps": 2, "train.batch_size": 8, "train.eval_batch_size": 8},
        **{"machine.dim": 8, "machine.decay": 0.9, "rehearsal.layers": 1},
    }
    card = f"--config={ROOT / 'configs' / 'synthetic.py'}:local"
    kind = ["--import=tests.decayed", "--config.machine.kind=decayed"]
    keys = [f"--config.{key}={value}" for key, value in sizes.items()]
    done = main(card, *kind, f"--workdir={tmp_path / 'run'}", *keys)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())[0]["memory"] == "decayed"


def test_importing_the_package_imports_no_heavy_library():
    heavy = ("jax", "orbax", "grain", "tensorflow_datasets", "optax", "numpy")
    code = f"import sys, rmjax; print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    for name in rmjax.__all__:
        assert getattr(rmjax, name) is not None and name in dir(rmjax)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rmjax.nothing  # noqa: B018


def test_a_segment_encoder_can_be_passed_in():
    """This one looks ids up in its own table, as a pretrained text encoder does."""
    table = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)

    def init(key, dim, length):
        return {"scale": jnp.ones(dim), "length": jnp.zeros((length, 0))}

    def apply(params, items, x, mask, key=None):
        assert x.shape == (*items.shape, 8)
        return jnp.asarray(table)[items] * params["scale"]

    encoder = rmjax.SegmentEncoder(init, apply)
    machine = rmjax.make("rehearsal", 10, dim=8, slots=3, segment_length=4, segment_encoder=encoder)
    params = machine.init(jax.random.key(0))
    items = np.arange(8, dtype=np.int32).reshape(1, 2, 4) % 10
    features, _ = machine.encode(params, items, np.ones(items.shape, bool))
    np.testing.assert_array_equal(features, table[items])
    memory = rmjax.memorize(machine, params, items, np.ones(items.shape, bool)).memory
    assert memory.slots.shape == (1, 3, 8) and params["encoder"]["length"].shape == (4, 0)
    with pytest.raises(ValueError, match="'gru' reads no segment_encoder: .* rehearsal, continual"):
        rmjax.make("gru", 10, segment_encoder=encoder)


def test_sources_that_share_a_section_agree_on_its_defaults():
    @dataclasses.dataclass(frozen=True)
    class Other:
        section: ClassVar[str] = "text"
        reset_segments: int = setting(7, at_least(0), "another default")

    both = r"config\.data\.text\.reset_segments has the default 7, and 0 in 'wikitext' \(rmjax\."
    with pytest.raises(ValueError, match=both):
        rmjax.register_source("mine", Other)
