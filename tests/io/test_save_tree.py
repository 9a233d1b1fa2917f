"""Trees saved as directories: their paths, complete writes, and checks when they are read."""

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
        tree = TREE | {"w": TREE["w"] + number}
        save_tree(tmp_path / "latest", tree, {"number": number})
        assert (tmp_path / "latest").is_symlink()
        for path in (tmp_path / "latest", tmp_path / "disk" / "saved"):
            np.testing.assert_array_equal(load_tree(path, like)["w"], TREE["w"] + number)
    assert sorted(path.name for path in tmp_path.rglob("*saved*")) == ["saved"]


def test_home_directories_addresses_and_patterns_in_paths(tmp_path, monkeypatch):
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
        with pytest.raises(ValueError, match=message):
            memoria.save(CONFIG, state, path)
        with pytest.raises(ValueError, match=message):
            memoria.load(CONFIG, path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "plain"]


def test_a_full_disk_is_an_error_and_the_old_tree_stays(tmp_path, monkeypatch):
    path = tmp_path / "saved"
    save_tree(path, TREE, {})

    def full(path, leaves, about):
        path.mkdir()
        raise ValueError(f"RESOURCE_EXHAUSTED: Failed writing: {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        full_disk = r"saved: 24 bytes could not be written \(no space is left\): free space"
        with pytest.raises(OSError, match=full_disk):
            save_tree(path, jax.tree.map(lambda x: x + 1, TREE), {})
    np.testing.assert_array_equal(load_tree(path, like)["w"], TREE["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def edited(path: Path, change) -> None:
    """Changes a manifest, and writes the digests again."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(change(manifest)))
    (path / "SHA256SUMS").write_text(checkpoint._sums(path))


NO_LEAVES = "manifest.json: leaves must be"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: [], NO_LEAVES),
        (lambda m: {}, NO_LEAVES),
        (lambda m: m | {"leaves": m["leaves"] | {"w": 5}}, NO_LEAVES),
        (lambda m: m | {"leaves": m["leaves"] | {"w": ["float32", [-1]]}}, NO_LEAVES),
        (
            lambda m: m | {"leaves": m["leaves"] | {"w": ["float32", [7]]}},
            r"w: found float32\[7\], expected float32\[6\]",
        ),
    ],
)
def test_the_error_of_an_edited_manifest_names_the_file_or_leaf(tmp_path, change, message):
    save_tree(tmp_path / "saved", TREE, {})
    edited(tmp_path / "saved", change)
    with pytest.raises(ValueError, match=message) as error:
        load_tree(tmp_path / "saved", like)
    assert str(tmp_path) in str(error.value)


def test_the_error_of_arrays_unlike_the_manifest_names_the_leaf(tmp_path):
    save_tree(tmp_path / "saved", TREE, {})
    edited(tmp_path / "saved", lambda m: m | {"leaves": m["leaves"] | {"w": ["float32", [7]]}})
    both = r"w is \['float32', \[6\]\] in arrays, but \['float32', \[7\]\] in manifest"
    with pytest.raises(ValueError, match=both):
        load_tree(tmp_path / "saved", lambda manifest: TREE | {"w": np.zeros(7, np.float32)})
