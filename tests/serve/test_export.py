"""An export answers as the model does, and needs no rmjax."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.machines import current_memory, feed, open_stream
from rmjax.serve.export import write_export
from tests.serve.test_streams import PARAMS, TASK
from tests.small import ITEMS, N

SERVER = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import live
given = np.load(sys.argv[2])
state = live.open_streams(len(given["items"]))
for t in range(given["items"].shape[1]):
    state = live.write(state, given["items"][:, t], given["mask"][:, t])
assert not any(name.startswith("rmjax") for name in sys.modules)
np.savez(sys.argv[3], scores=live.answer(state, given["query"], given["query"] >= 0), **state)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pytest.importorskip("flatbuffers")
    folder = tmp_path_factory.mktemp("export") / "served"
    write_export(TASK, PARAMS, folder)
    write_export(TASK, PARAMS, folder, items=7)  # replaces the first export
    return folder


@pytest.mark.parametrize("rows, asked", [(3, 2), (1, 5)])
def test_an_export_serves_without_rmjax(served, tmp_path, rows, asked):
    rng = np.random.default_rng(rows)
    items = rng.integers(0, ITEMS, (rows, 5, 7)).astype(np.int32)
    query = rng.integers(0, ITEMS, (rows, asked))
    mask = np.arange(7) < rng.integers(0, 8, (rows, 5, 1))
    np.savez(tmp_path / "given.npz", items=items, mask=mask, query=query.astype(np.int32))
    line = [sys.executable, "-c", SERVER, served, tmp_path / "given.npz", tmp_path / "result.npz"]
    subprocess.run(list(map(str, line)), check=True, cwd=tmp_path, env={"JAX_PLATFORMS": "cpu"})
    result = np.load(tmp_path / "result.npz")
    stream = open_stream(TASK.machine, PARAMS["machine"], rows, N)
    step = jax.jit(feed, static_argnums=0)
    for t in range(5):
        stream = step(TASK.machine, PARAMS["machine"], stream, items[:, t], mask[:, t])
    memory = current_memory(TASK.machine, PARAMS["machine"], stream)
    expected = TASK.answer(PARAMS, memory, jnp.asarray(query), jnp.ones(query.shape, bool))
    np.testing.assert_allclose(result["scores"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result["tail_len"], stream.tail_len)


def test_the_loader_is_short_and_imports_little(served):
    text = (served / "live.py").read_text()
    imported = {*re.findall(r"^(?:import|from) (\w+)", text, re.M)}
    assert imported == {"json", "pathlib", "jax", "numpy"}
    assert len([line for line in text.splitlines() if line and not line.startswith('"""')]) <= 20


def test_a_folder_that_is_no_export_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine exists and is not an export"):
        write_export(TASK, PARAMS, tmp_path / "mine")


def test_links_and_the_home_directory_are_followed(tmp_path, monkeypatch, served):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "latest").symlink_to(tmp_path / "disk")
    shutil.copytree(served, tmp_path / "disk")
    write_export(TASK, PARAMS, "~/latest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "latest"]
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "disk" / "live.py").is_file()


def test_missing_flatbuffers_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'rmjax\[export\]'"):
        write_export(TASK, PARAMS, tmp_path / "served")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    pytest.importorskip("flatbuffers")
    monkeypatch.setattr(os, "fsync", full)
    message = r"write.bin: [\d,]+ bytes could not be written \(no space is left\)"
    with pytest.raises(OSError, match=message):
        write_export(TASK, PARAMS, tmp_path / "served")
    assert not any(tmp_path.iterdir())


def test_a_url_is_refused():
    pytest.importorskip("flatbuffers")
    with pytest.raises(ValueError, match="--out=s3://b/served is an address"):
        write_export(TASK, PARAMS, "s3://b/served")
