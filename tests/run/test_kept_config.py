"""A config.json that is damaged, or was changed, is refused and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmjax.data import make_source
from rmjax.run import kept, parameters, resume, training
from tests.runs import PLAIN, tiny


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A workdir as a run leaves it, with an empty checkpoint."""
    config = tiny(**PLAIN)
    resume.check_same_config(config, tmp_path, make_source(config.data, 0))
    (tmp_path / "model" / "000000001").mkdir(parents=True)
    return tmp_path


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    values["data"] |= changes
    path.write_text(json.dumps(values))


def test_a_config_is_read_as_it_was_written(workdir):
    config, data = kept.read_config(workdir)
    assert config.to_json() == tiny(**PLAIN).to_json() and data["train"] == 64


def test_the_folder_of_the_data_may_change(workdir):
    edit(workdir / "config.json", dir="/elsewhere", workers=3)
    assert kept.read_config(workdir)[0].data.dir == "/elsewhere"


def test_older_runs_without_a_digest_are_read(workdir):
    values = json.loads((workdir / "config.json").read_text())
    del values["digest"], values["data"]["prefetch"]
    (workdir / "config.json").write_text(json.dumps(values))
    assert kept.read_config(workdir)[0].to_json() == tiny(**PLAIN).to_json()


DAMAGE = {
    "another value": (
        lambda text: text.replace('"segment_length": 10', '"segment_length": 7'),
        "was changed after",
    ),
    "an impossible value": (
        lambda text: json.dumps(without_digest(text, segment_length=0)),
        "config.data.segment_length = 0: must be a whole number, at least 1",
    ),
    "another type": (
        lambda text: json.dumps(without_digest(text, segment_length="ten")),
        "segment_length",
    ),
    "an unknown key": (
        lambda text: json.dumps(without_digest(text, segment=3)),
        "config.data.segment: no such key",
    ),
    "truncated": (lambda text: text[:300], "no whole JSON: line"),
    "empty": (lambda text: "", "the file is empty"),
    "no config": (lambda text: "[1]", "is not the config of a run"),
    "no data": (lambda text: "{}", "is not the config of a run"),
}


def without_digest(text: str, **changes) -> dict:
    values = json.loads(text)
    del values["digest"]
    values["data"] |= changes
    return values


def test_the_lengths_of_batches_may_not_change_since_draws_depend_on_them(tmp_path):
    before, after = (json.loads(tiny(**{"data.shapes": n}).to_json()) for n in (0, 1))
    with pytest.raises(ValueError, match="config.data.shapes was 0, now 1"):
        kept.refuse_other(tmp_path, before, after)
    assert kept.values_digest(before) != kept.values_digest(after)


def test_keys_of_loggers_may_change_when_a_run_continues(tmp_path):
    values = json.loads(tiny().to_json())
    before, after = (values | {"logger": {"workspace": name}} for name in ("a", "b"))
    kept.refuse_other(tmp_path, before, after)
    assert kept.values_digest(before) == kept.values_digest(after)
    with pytest.raises(ValueError, match="config.seed was 0, now 1"):
        kept.refuse_other(tmp_path, before, after | {"seed": 1})


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(workdir, name):
    path, (harm, words) = workdir / "config.json", DAMAGE[name]
    path.write_text(harm(path.read_text()))
    source = make_source(tiny().data, 0)
    readers = {
        "trained": lambda: training.trained(workdir),
        "start_from": lambda: parameters.read_start(workdir, source, {}),
        "the same line": lambda: resume.check_same_config(tiny(**PLAIN), workdir, source),
    }
    for reader, read in readers.items():
        with pytest.raises(ValueError, match="config") as error:
            read()
        other_values = "value" in name or name in ("another type", "an unknown key")
        if reader != "the same line" or not other_values:
            assert words in str(error.value) and str(path) in str(error.value), reader


def test_checkpoints_without_their_config_are_refused(workdir):
    (workdir / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        resume.check_same_config(tiny(), workdir, make_source(tiny().data, 0))


@pytest.mark.parametrize("path", ["gs://b/x", "runs/lr[0.01]"])
def test_an_impossible_workdir_is_refused_before_anything_is_made(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    trained = lambda _, workdir: training.trained(workdir)
    for run in (training.train, training.evaluate_only, trained):
        with pytest.raises(ValueError, match="is an address|in its whole path"):
            run(tiny(), path)
    assert not any(tmp_path.iterdir())


def test_a_workdir_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "x" / "config.json")):
        training.trained("~/x")
    with training.opened(tiny(), "~/y"):
        pass
    assert (tmp_path / "y" / "config.json").is_file() and not (tmp_path / "~").exists()
