"""Writes that are there wholly or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from rmjax.io import atomic


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


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "f").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"f: 1,000 bytes could not be written \(no space is left\): free space"):
        atomic.write(tmp_path / "f", "x" * 1000)
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_unwritable_folder(tmp_path):
    with pytest.raises(OSError, match="no/f: 1 bytes could not be written"):
        atomic.write(tmp_path / "no" / "f", "x")
