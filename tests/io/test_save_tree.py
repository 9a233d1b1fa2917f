"""What is saved as a directory goes where the user means, whole or not at all, and is checked when it is read."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rmjax import memoria
from rmjax.io import checkpoint
from rmjax.io.checkpoint import load_tree, save_tree
from tests.memoria.runs import small

TREE = {"w": np.arange(6.0, dtype=np.float32), "none": np.zeros((0, 3), np.float32)}
CONFIG = small()


def like(manifest: dict) -> dict:
    return TREE


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "saved")
    for number in range(3):
        save_tree(
            tmp_path / "latest", {"w": TREE["w"] + number, "none": TREE["none"]}, {"number": number}
        )
        assert (tmp_path / "latest").is_symlink()
        for path in (tmp_path / "latest", tmp_path / "disk" / "saved"):
            np.testing.assert_array_equal(load_tree(path, like)["w"], TREE["w"] + number)
    assert sorted(path.name for path in tmp_path.rglob("*saved*")) == ["saved"]


def test_paths_are_those_that_the_user_means(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    state = memoria.init(CONFIG)
    memoria.save(CONFIG, state, "~/state")
    memoria.load(CONFIG, "~/state")
    (tmp_path / "plain").symlink_to(tmp_path / "lr[0.1]")
    for path, message in (
        ("s3://bucket/state", "path=s3://bucket/state is an address"),
        ("lr[0.1]/state", r"path=.*lr\[0.1\]/state has '\[' in its whole path"),
        ("plain", r"has '\[' in its whole path"),
    ):
        for act in (
            lambda path: memoria.save(CONFIG, state, path),
            lambda path: memoria.load(CONFIG, path),
        ):
            with pytest.raises(ValueError, match=message):
                act(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "plain"]


def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "saved"
    save_tree(path, TREE, {})

    def full(path, leaves, about):
        path.mkdir()
        raise ValueError(f"RESOURCE_EXHAUSTED: Failed writing: {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        with pytest.raises(
            OSError, match=r"saved: 24 bytes could not be written \(no space is left\): free space"
        ):
            save_tree(path, jax.tree.map(lambda x: x + 1, TREE), {})
    np.testing.assert_array_equal(load_tree(path, like)["w"], TREE["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def edited(path: Path, change) -> None:
    """Changes a manifest and brings the digests in order."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(change(manifest)))
    (path / "SHA256SUMS").write_text(checkpoint._sums(path))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: [], "manifest.json: leaves must be"),
        (lambda m: {}, "manifest.json: leaves must be"),
        (lambda m: m | {"leaves": m["leaves"] | {"w": 5}}, "manifest.json: leaves must be"),
        (
            lambda m: m | {"leaves": m["leaves"] | {"w": ["float32", [-1]]}},
            "manifest.json: leaves must be",
        ),
        (
            lambda m: m | {"leaves": m["leaves"] | {"w": ["float32", [7]]}},
            r"w: found float32\[7\], expected float32\[6\]",
        ),
    ],
)
def test_a_manifest_that_was_edited_is_refused_by_name(tmp_path, change, message):
    save_tree(tmp_path / "saved", TREE, {})
    edited(tmp_path / "saved", change)
    with pytest.raises(ValueError, match=message) as error:
        load_tree(tmp_path / "saved", like)
    assert str(tmp_path) in str(error.value)


def test_arrays_that_are_not_those_of_the_manifest_are_refused_by_name(tmp_path):
    save_tree(tmp_path / "saved", TREE, {})
    edited(tmp_path / "saved", lambda m: m | {"leaves": m["leaves"] | {"w": ["float32", [7]]}})
    with pytest.raises(
        ValueError,
        match=r"w is \['float32', \[6\]\] in arrays, but \['float32', \[7\]\] in manifest",
    ):
        load_tree(tmp_path / "saved", lambda manifest: TREE | {"w": np.zeros(7, np.float32)})
