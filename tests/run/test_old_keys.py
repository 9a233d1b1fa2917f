"""Runs, cards and flags of older versions: renamed and removed keys, and keys of other kinds."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from rmjax import command_line
from rmjax import config as configs
from rmjax.data import make_source
from rmjax.run import kept, resume, training
from rmjax.tools import ablate
from tests.runs import PLAIN, compilations_kept, tiny

SHORT = PLAIN | {"train.steps": 4, "train.save_every": 2, "train.eval_every": 4}
SOURCE = make_source(tiny().data, 0)


def rewrite(path, change):
    """Writes a config.json anew, with values that `change` has changed, as an old version would."""
    values = json.loads(path.read_text())
    del values["digest"]
    change(values)
    path.write_text(kept.sealed(values))


def begun(workdir, config):
    """A workdir as a run leaves it, with an empty checkpoint; returns its config.json."""
    resume.check_same_config(config, workdir, SOURCE)
    (workdir / "model" / "000000001").mkdir(parents=True)
    return workdir / "config.json"


@pytest.fixture
def old_names(monkeypatch):
    """Renames three keys: of a machine, from another section, and one that may change in a run."""
    names = {"machine.sum": "machine.history_sum", "model_clip": "train.clip"}
    for old, new in (names | {"data.folder": "data.dir"}).items():
        monkeypatch.setitem(configs.RENAMED, old, new)


def age(values):
    """Gives values the old names."""
    values["machine"]["sum"] = values["machine"].pop("history_sum")
    values["model_clip"] = values["train"].pop("clip")
    values["data"]["folder"] = values["data"].pop("dir")


def test_the_tables_of_old_keys_fit_the_schema():
    old = configs.RENAMED.keys() | configs.REMOVED.keys()
    assert not old & configs.SCHEMA.keys()
    assert set(configs.RENAMED.values()) <= configs.SCHEMA.keys()


def test_a_run_with_old_names_opens_and_continues(tmp_path, old_names):
    """Its numbers are those of the run that did not stop."""
    run, last = tmp_path / "run", tmp_path / "run" / "model" / "000000004"
    with compilations_kept(tmp_path / "compiled"):
        config = tiny(**SHORT, **{"machine.history_sum": False, "train.clip": 2.5})
        rows = training.train(config, run)
        rewrite(run / "config.json", age)
        opened, _ = kept.read_config(run)
        assert opened.to_json() == config.to_json()
        shutil.rmtree(last)  # as if it had stopped after two steps
        (run / "results.json").unlink()
        assert training.train(config, run) == rows and last.exists()


def test_another_value_of_an_old_name_is_refused(tmp_path, old_names):
    path = begun(tmp_path, tiny(**PLAIN))
    rewrite(path, age)
    resume.check_same_config(tiny(**PLAIN, **{"data.dir": "elsewhere"}), tmp_path, SOURCE)
    words = "config.machine.history_sum was True, now False; config.train.clip was 5.0, now 3.0"
    other = {"machine.history_sum": False, "train.clip": 3.0}
    with pytest.raises(ValueError, match=words):
        resume.check_same_config(tiny(**PLAIN, **other), tmp_path, SOURCE)
    path.write_text(path.read_text().replace('"sum": true', '"sum": false'))
    with pytest.raises(ValueError, match="was changed after the run wrote it"):
        kept.read_config(tmp_path)
    path.write_text(path.read_text().replace('"folder": ""', '"folder": "x"'))  # it may change
    path.write_text(path.read_text().replace('"sum": false', '"sum": true'))
    assert kept.read_config(tmp_path)[0].data.dir == "x"


def test_a_table_of_runs_with_old_names_continues(tmp_path, old_names):
    config, table = tiny(), ablate.tables.table_of("rm1")
    ablate.check_same_config(config, tmp_path)
    path = tmp_path / "ablation.json"
    values = json.loads(path.read_text())
    age(values)
    path.write_text(json.dumps(values))
    ablate.check_same_config(config, tmp_path)
    with pytest.raises(ValueError, match="config.train.clip was 5.0, now 1.0"):
        ablate.check_same_config(tiny(**{"train.clip": 1.0}), tmp_path)
    name = next(iter(table.rows))
    row = lambda **changes: table._replace(rows={name: table.rows[name]._replace(changes=changes)})
    ablate.check_same_rows("rm1", row(**{"train.clip": 2.0}), tmp_path)
    path = tmp_path / "rows.json"
    path.write_text(path.read_text().replace("train.clip", "model_clip"))
    with pytest.raises(ValueError, match="begun with {'train.clip': 2.0}, now it is"):
        ablate.check_same_rows("rm1", row(**{"train.clip": 3.0}), tmp_path)
    ablate.check_same_rows("rm1", row(**{"train.clip": 2.0}), tmp_path)


def test_a_config_may_have_old_names(old_names, caplog):
    config = tiny()
    config.machine.sum, config.model_clip = False, 2  # a whole number for a float
    configs.validate(config)
    assert config.machine.history_sum is False and config.train.clip == 2
    assert "sum" not in config.machine and "model_clip" not in config
    assert "config.machine.sum is called config.machine.history_sum today." in caplog.text
    config.model_clip, config.train.clip = 3.0, 4.0
    words = "config.model_clip = 3.0 and config.train.clip = 4.0: the first is the old name of the"
    with pytest.raises(ValueError, match=words):
        configs.validate(config)
    config.train.clip = 3.0
    configs.validate(config)
    config.model_clip = "much"
    with pytest.raises(ValueError, match="config.train.clip = 'much': must be a number, above 0"):
        configs.validate(changed_back(config))


def changed_back(config):
    config.train.clip = configs.SCHEMA["train.clip"].default
    return config


CARD = """
from rmjax import config
def get_config(arg=None):
    card = config.base()
    card.machine.sum = False
    card.model_clip = 2.0
    return card
"""


def parsed(tmp_path, monkeypatch, *arguments):
    """The config of a command line with a card that has old names."""
    (tmp_path / "card.py").write_text(CARD)
    (tmp_path / "flags").write_text("--config.model_clip=7\n")
    argv = ["main.py", f"--config={tmp_path / 'card.py'}", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "The card.", flag_values=values, sys_argv=argv)
    monkeypatch.setattr(flags, "FLAGS", values)
    flags.DEFINE_list("import", [], "", flag_values=values)
    command_line.check_flags(argv)
    command_line.parse_flags(argv)
    sys.modules.pop("config_config", None)  # so that the next card is not run in this one's names
    return values.config


@pytest.mark.parametrize(
    ("arguments", "clip"),
    [
        ([], 2.0),
        (["--config.model_clip=3"], 3.0),
        (["--config.model_clip", "3"], 3.0),
        (["--config.train.clip=3"], 3.0),
        (["--config.train.clip=5"], 5.0),  # the default, by a flag, wins over the card too
        (["--config.model_clip=3", "--noconfig.machine.remat"], 3.0),
        (["--flagfile={folder}/flags"], 7.0),
    ],
)
def test_flags_and_cards_may_have_old_names(tmp_path, monkeypatch, old_names, arguments, clip):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    config = parsed(tmp_path, monkeypatch, *arguments)
    assert (config.train.clip, config.machine.history_sum) == (clip, False)
    assert "model_clip" not in config
    configs.validate(config)


def test_a_flag_of_an_old_name_says_the_new_one(tmp_path, monkeypatch, old_names, caplog):
    config = parsed(tmp_path, monkeypatch, "--noconfig.machine.sum")
    assert config.machine.history_sum is False
    assert "config.machine.sum is called config.machine.history_sum today." in caplog.text


def test_a_removed_key_may_have_the_value_that_runs_compute_with(tmp_path, monkeypatch):
    path = begun(tmp_path, tiny(**PLAIN))
    rewrite(path, lambda values: values["machine"].update(bias=True))
    unknown = "config.machine.bias: no such key in this version: if it is of a kind of your own, im"
    for read in (kept.read_config, lambda folder: resume.check_same_config(tiny(), folder, SOURCE)):
        with pytest.raises(ValueError, match=unknown):
            read(tmp_path)
    monkeypatch.setitem(configs.REMOVED, "machine.bias", True)
    assert kept.read_config(tmp_path)[0].to_json() == tiny(**PLAIN).to_json()
    resume.check_same_config(tiny(**PLAIN), tmp_path, SOURCE)
    rewrite(path, lambda values: values["machine"].update(bias=False))
    removed = "config.machine.bias: it was removed, and runs compute with True today: use the vers"
    for read in (kept.read_config, lambda folder: resume.check_same_config(tiny(), folder, SOURCE)):
        with pytest.raises(ValueError, match=removed):
            read(tmp_path)
    with pytest.raises(SystemExit, match="it was removed, and runs compute with True: leave it"):
        command_line.check_flags(["main.py", "--config.machine.bias=False"])
    monkeypatch.setattr(kept, "MAY_CHANGE", (*kept.MAY_CHANGE, "machine.bias"))
    rewrite(path, lambda values: None)  # the digest leaves out what may change
    assert kept.read_config(tmp_path)[0].to_json() == tiny(**PLAIN).to_json()
    resume.check_same_config(tiny(**PLAIN), tmp_path, SOURCE)


@pytest.mark.parametrize("section", ["data.babi", "model", "train"])
def test_an_unknown_key_is_refused_since_the_file_may_be_damaged(tmp_path, section):
    path, (first, *inner) = begun(tmp_path, tiny(**PLAIN)), section.split(".")
    rewrite(path, lambda values: (values[first][inner[0]] if inner else values[first]).update(x=3))
    for read in (kept.read_config, lambda folder: resume.check_same_config(tiny(), folder, SOURCE)):
        with pytest.raises(ValueError, match=f"config.{section}.x: no such key in this version"):
            read(tmp_path)


def test_a_run_opens_without_the_kinds_from_outside_that_it_does_not_use(tmp_path):
    """tests/decayed.py has the key machine.decay."""
    from tests import decayed  # noqa: F401

    assert configs.outside_keys() >= {"machine.decay"}
    used = {"machine.kind": "decayed"}
    for name, changes in (("gru", {}), ("set", {"machine.decay": 0.5}), ("decayed", used)):
        (tmp_path / name).mkdir()
        path, config = tmp_path / name / "config.json", tiny(**PLAIN | changes)
        begun(tmp_path / name, config)
        assert ("decay" in json.loads(path.read_text())["machine"]) == (name != "gru")
        assert kept.read_config(tmp_path / name)[0].to_json() == config.to_json()
        resume.check_same_config(config, tmp_path / name, SOURCE)
    with pytest.raises(ValueError, match="config.machine.decay was 0.99, now 0.7"):
        resume.check_same_config(
            tiny(**PLAIN | used | {"machine.decay": 0.7}), tmp_path / "decayed", SOURCE
        )


@pytest.mark.parametrize("place", ["first", "last"])  # older runs have it last
def test_the_cure_of_a_changed_config_works_as_it_is_printed(tmp_path, place):
    path = begun(tmp_path, tiny(**PLAIN))
    values = json.loads(path.read_text())
    assert next(iter(values)) == "digest"  # so a reader may remove its line, too
    if place == "last":
        values["digest"] = values.pop("digest")
    text = json.dumps(values, indent=1).replace('"clip": 5.0', '"clip": 4.0')
    path.write_text(text)
    cure = 'put the values back, or write null as the value of "digest" if they are right'
    with pytest.raises(ValueError, match=cure):
        kept.read_config(tmp_path)
    path.write_text(text.replace(f'"digest": "{values["digest"]}"', '"digest": null'))
    assert kept.read_config(tmp_path)[0].train.clip == 4.0
    if place == "first":
        path.write_text("\n".join(line for line in text.split("\n") if "digest" not in line))
        assert kept.read_config(tmp_path)[0].train.clip == 4.0
