"""Writes are complete or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from rmjax.io import atomic
from tests import ROOT


def test_write_replaces(tmp_path):
    for content in ("one", b"two"):
        atomic.write(tmp_path / "f", content)
    assert (tmp_path / "f").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "f").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    full_disk = r"f: 1,000 bytes could not be written \(no space is left\): free space"
    with pytest.raises(OSError, match=full_disk):
        atomic.write(tmp_path / "f", "x" * 1000)
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_unwritable_folder(tmp_path):
    with pytest.raises(OSError, match="no/f: 1 bytes could not be written"):
        atomic.write(tmp_path / "no" / "f", "x")


@pytest.mark.parametrize("outcome", ["renamed", "error", "left"])
def test_a_folder_leaves_only_what_was_renamed(tmp_path, outcome):
    def fill():
        with atomic.folder(tmp_path / "root") as scratch:
            (scratch / "made").mkdir()
            (scratch / "made" / "file").write_text("content")
            if outcome == "error":
                raise ValueError("an error")
            if outcome == "renamed":
                (scratch / "made").rename(tmp_path / "root" / "made")

    if outcome == "error":
        with pytest.raises(ValueError, match="an error"):
            fill()
    else:
        fill()
    names = [path.name for path in (tmp_path / "root").iterdir()]
    assert names == (["made"] if outcome == "renamed" else [])


HOLDS = """
import sys
from pathlib import Path
from rmjax.io import atomic
from tests import ROOT
with atomic.folder(Path(sys.argv[1])) as scratch:
    (scratch / "file").write_text("content")
    print("ready", flush=True)
    sys.stdin.readline()
    sys.exit(not (scratch / "file").exists())
"""


def test_folders_of_killed_processes_are_removed(tmp_path):
    """One process is killed while it prepares; another lives on."""
    pipe, line = subprocess.PIPE, [sys.executable, "-c", HOLDS, str(tmp_path)]
    dead, living = (subprocess.Popen(line, stdin=pipe, stdout=pipe, cwd=ROOT) for _ in range(2))
    for process in (dead, living):
        assert process.stdout.readline() == b"ready\n"
    dead.kill()
    dead.communicate()
    assert len(list(tmp_path.glob("incomplete.*"))) == 2
    with atomic.folder(tmp_path) as scratch:
        assert len(list(tmp_path.glob("incomplete.*"))) == 2 and scratch in tmp_path.iterdir()
    assert len(list(tmp_path.iterdir())) == 1  # of the living process
    living.communicate(b"\n")
    assert living.returncode == 0 and not list(tmp_path.iterdir())


def test_without_locks_no_folder_is_removed(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    (tmp_path / "incomplete.x").mkdir()
    (tmp_path / "incomplete.x" / "lock").touch()
    (tmp_path / "incomplete.of-another-program").mkdir()
    monkeypatch.setattr(atomic.fcntl, "flock", none)
    with atomic.folder(tmp_path):
        pass
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    with atomic.folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["incomplete.of-another-program"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"file/below: .* set config\.data\.cache_dir"),
        atomic.folder(tmp_path / "file" / "below"),
    ):
        pass
