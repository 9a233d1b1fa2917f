"""Paths that users give: home directories, addresses, patterns, hidden files."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmjax.io import paths


def test_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.resolve("~/runs", "--workdir") == tmp_path / "runs"
    assert paths.resolve("runs/x", "--workdir") == Path("runs/x")


@pytest.mark.parametrize(
    "path", ["gs://bucket/runs", "s3://b/x", "https://a.b/c", "file:///tmp/x", "hdfs://n:1/x"]
)
def test_addresses_are_refused(path):
    with pytest.raises(ValueError, match="--workdir=.*only folders of this machine.*mount it"):
        paths.resolve(path, "--workdir")


@pytest.mark.parametrize("path", ["c:/runs", "a:b", "runs/lr:0.1", "x//y"])
def test_a_path_may_look_like_an_address(path):
    if path != "c:/runs":
        assert paths.resolve(path, "--workdir") == Path(path)


@pytest.mark.parametrize("name", ["lr[0.01]", "a*b", "what?", "back\\slash"])
def test_patterns_are_refused_for_folders_of_checkpoints(tmp_path, name):
    with pytest.raises(ValueError, match="could not be read again"):
        paths.resolve_checkpoint(tmp_path / name, "--workdir")
    with pytest.raises(ValueError, match="could not be read again"):
        paths.resolve_checkpoint(tmp_path / name / "below", "--workdir")


def test_a_pattern_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "lr[1]").mkdir()
    monkeypatch.chdir(tmp_path / "lr[1]")
    with pytest.raises(ValueError, match="could not be read again"):
        paths.resolve_checkpoint("runs", "--workdir")


def test_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert paths.cache("") == tmp_path / ".cache" / "rmjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert paths.cache("") == tmp_path / ".cache" / "rmjax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert paths.cache("") == tmp_path / "other" / "rmjax"
    assert paths.cache("~/mine") == tmp_path / "mine"


def test_no_home_directory(monkeypatch):
    def none(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", none)
    with pytest.raises(ValueError, match=r"config\.data\.cache_dir"):
        paths.cache("")
    with pytest.raises(ValueError, match="--workdir=~/x"):
        paths.resolve("~/x", "--workdir")


def test_visible(tmp_path):
    for name in ("b.txt", "a.txt", "._a.txt", ".DS_Store", "c.md"):
        (tmp_path / name).touch()
    assert [path.name for path in paths.visible(tmp_path, "*.txt")] == ["a.txt", "b.txt"]
    assert [path.name for path in paths.visible(tmp_path)] == ["a.txt", "b.txt", "c.md"]


def test_the_cause_of_a_missing_file_is_given(tmp_path):
    folder = tmp_path / "data"
    assert paths.lacks("", "a.csv") == "data.dir, which is empty"
    assert paths.lacks(str(folder), "a.csv") == f"{folder}, which does not exist"
    folder.mkdir()
    assert paths.lacks(str(folder), "a.csv") == f"{folder}, which has no files"
    (folder / "b.csv").touch()
    assert paths.lacks(str(folder), "a.csv") == str(folder)
    a_file = f"{folder}/b.csv, which is a file: give its folder"
    assert paths.lacks(str(folder / "b.csv"), "a.csv") == a_file
    (folder / "c.zip").touch()
    unpack = f"unpack {folder}/c.zip, and give the folder it makes"
    assert paths.lacks(str(folder), "a.csv") == f"{folder}: {unpack}"
    assert paths.lacks(str(folder / "c.zip"), "a.csv") == f"{folder}/c.zip: {unpack}"
    (folder / "inner").mkdir()
    (folder / "inner" / "a.csv").touch()
    assert paths.lacks(str(folder), "a.csv") == f"{folder}, but in {folder}/inner: give that folder"
