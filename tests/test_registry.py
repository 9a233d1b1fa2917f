"""Kinds from outside the package: registered, listed, made, trained by the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmjax
from rmjax import config as configs
from rmjax import machines
from rmjax.data import make_source
from rmjax.data.texts.sorting import Sorting
from rmjax.registry import MACHINES, SOURCES, Registry, fields_of
from tests import ROOT, decayed
from tests.runs import tiny


@pytest.mark.parametrize("name", MACHINES)
def test_every_field_has_a_default_in_range_and_a_meaning(name):
    for field in fields_of(MACHINES[name].settings).values():
        assert field.doc and field.check.holds(field.default)
    MACHINES.settings(name, {})


def test_equal_names_are_equal_keys():
    """One key cannot have two defaults or two meanings."""
    fields = [item for name in MACHINES for item in fields_of(MACHINES[name].settings).items()]
    for name in {name for name, _ in fields}:
        defaults = {(field.default, field.check.text) for other, field in fields if other == name}
        assert len(defaults) == 1, name


def test_a_registered_kind_has_keys_of_its_own():
    assert configs.SCHEMA["machine.decay"].default == 0.99
    assert "decayed" in configs.SCHEMA["machine.kind"].check.text
    config = tiny(**{"machine.kind": "decayed", "machine.decay": 0.5})
    assert MACHINES.settings("decayed", config.machine) == decayed.Settings(8, 0.5)
    with pytest.raises(
        ValueError, match=r"config\.machine\.decay = 1\.5: must be a number, above 0 and below 1"
    ):
        tiny(**{"machine.kind": "decayed", "machine.decay": 1.5})


def test_a_registered_source_has_a_section_of_its_own(monkeypatch, capsys):
    """And all that a source of ours has: flags with ranges, a name in the list, a reader."""
    monkeypatch.setattr(SOURCES, "_registered", {})

    @dataclasses.dataclass(frozen=True)
    class Settings:
        streams: int = rmjax.setting(5, rmjax.at_least(1), "streams of each split")

    @rmjax.register_source("mine", Settings)
    def make(settings, common, seed):
        return Sorting(length=common.segment_length, train=settings.streams, seed=seed)

    config = tiny(**{"data.name": "mine", "data.mine.streams": 7})
    source = make_source(config.data, 3)
    assert (source.size("train"), source.length, source.seed) == (
        7,
        10,
        3,
    ) and not configs.is_sequence(config)
    assert configs.reads(config, "data.mine.streams") and not configs.reads(
        config, "data.babi.tasks"
    )
    with pytest.raises(
        ValueError, match=r"config\.data\.mine\.streams = 0: must be a whole number, at least 1"
    ):
        tiny(**{"data.name": "mine", "data.mine.streams": 0})
    with pytest.raises(SystemExit):
        configs.answer_list(["main", "--list=data.mine"])
    assert "--config.data.mine.streams=5  streams of each split" in capsys.readouterr().out


@pytest.mark.parametrize("name", SOURCES)
def test_every_key_of_a_source_has_a_default_in_range_and_a_meaning(name):
    for field in fields_of(SOURCES[name].settings).values():
        assert field.doc and field.check.holds(field.default)
    assert SOURCES.task_of(name) in ("questions", "last tokens", "every token", "documents")


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
    with pytest.raises(
        ValueError, match=r"Other\.dim: config\.thing\.dim has the default 64 in another kind"
    ):
        registry.register("other", Other)
    with pytest.raises(ValueError, match="unknown thing 'gur'; did you mean 'gru'"):
        registry["gur"]


def test_options_of_make_are_checked():
    with pytest.raises(
        ValueError, match="machine 'gru' has no option 'slots'; there are dim, history_sum"
    ):
        machines.make("gru", 10, slots=3)
    with pytest.raises(
        ValueError, match="normalize = 'both': must be a string, one of slots, items"
    ):
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
        ({"data.name": "books"}, "data.text.aligned", True),
        ({"data.name": "books"}, "data.babi.tasks", False),
        ({"data.name": "books"}, "machine.dim", False),
        ({"data.name": "books", "model.kind": "transformer"}, "memoria.working", False),
        ({}, "model.dim", False),
        ({}, "train.steps", True),
    ],
)
def test_which_keys_a_run_reads(changes, name, read):
    assert configs.reads(tiny(**changes), name) == read


def test_keys_that_are_not_read_are_refused_from_flags_and_a_warning_from_cards(tmp_path, caplog):
    config = tiny(**{"machine.kind": "gru", "machine.slots": 3})
    configs.refuse_unread(config, ["main.py"])
    assert (
        "config.machine.slots = 3: this run does not read it" in caplog.text
        and "'gru' remembers" in caplog.text
    )
    with pytest.raises(ValueError, match=r"config\.machine\.slots = 3.*leave the flag out"):
        configs.refuse_unread(config, ["main.py", "--config.machine.slots=3"])
    configs.refuse_unread(config, ["main.py", "--config.machine.slots=3"], warn=True)
    (tmp_path / "flags").write_text("--config.machine.slots=3\n")
    with pytest.raises(ValueError, match=r"config\.machine\.slots = 3.*leave the flag out"):
        configs.refuse_unread(config, ["main.py", f"--flagfile={tmp_path / 'flags'}"])
    configs.refuse_unread(tiny(), ["main.py", "--config.machine.slots=3"])


def main(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "rmjax.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )


def test_kinds_are_listed():
    done = main("--import=tests.decayed", "--list")
    assert (
        done.returncode == 0
        and "machine: rehearsal, continual, gru" in done.stdout
        and "decayed" in done.stdout
    )
    done = main("--import=tests.decayed", "--list=machine.decayed")
    assert done.returncode == 0 and "--config.machine.decay=0.99  decayed: factor" in done.stdout
    done = main("--list=machine.rehersal")
    assert done.returncode == 1 and "did you mean machine.rehearsal?" in done.stderr
    done = main("--import=no_such.module", "--list")
    assert done.returncode == 1 and "--import=no_such.module: ModuleNotFoundError" in done.stderr


def test_a_machine_of_somebody_else_trains_by_the_command_line(tmp_path):
    world = [f"--config.data.synthetic.{name}=2" for name in ("train", "valid", "test")]
    sizes = [
        "--config.train.steps=2",
        "--config.train.batch_size=8",
        "--config.machine.dim=8",
        "--config.machine.decay=0.9",
    ]
    card = f"--config={ROOT / 'configs' / 'synthetic.py'}:local"
    kind = [
        "--import=tests.decayed",
        "--config.machine.kind=decayed",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = main(
        card,
        *kind,
        *world,
        *sizes,
        "--config.rehearsal.layers=1",
        "--config.train.eval_batch_size=8",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())[0]["memory"] == "decayed"


def test_importing_the_package_imports_nothing():
    heavy = ("jax", "orbax", "grain", "tensorflow_datasets", "optax", "numpy")
    code = f"import sys, rmjax; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    for name in rmjax.__all__:
        assert getattr(rmjax, name) is not None and name in dir(rmjax)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rmjax.nothing  # noqa: B018


def test_a_segment_encoder_is_a_value_that_is_passed_in():
    """One that reads ids by a table of its own, as a pretrained text encoder does."""
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
