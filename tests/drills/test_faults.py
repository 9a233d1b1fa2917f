"""Drills: each fault of a machine happens to a run once; the run reports it and can continue."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import ROOT
from tests.run.test_processes import agree
from tests.runs import PLAIN, lines, saved

CARD = """
from tests import runs
from tests import ROOT

def get_config(arg=""):
    return runs.tiny(**{changes!r})
"""
LONG = PLAIN | {"train.steps": 300, "train.eval_every": 50, "train.save_every": 20}
pytestmark = pytest.mark.slow


def start(tmp_path: Path, workdir: Path, *flags: str, changes: dict = LONG) -> subprocess.Popen:
    (tmp_path / "card.py").write_text(CARD.format(changes=changes))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    line = [sys.executable, "-m", "rmjax.main", f"--config={tmp_path / 'card.py'}"]
    line += [f"--workdir={workdir}", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(line, env=environment, **pipes)


def ended(process: subprocess.Popen, code: int, *parts: str) -> None:
    """Checks the exit code, and that one line of the log has all parts."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert any(all(re.search(part, line) for part in parts) for line in err.splitlines()), err


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The workdir of an unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken")
    ended(start(folder, folder / "run"), 0)
    return folder / "run"


def same(run: Path, expected: Path) -> None:
    assert lines(run) == lines(expected)
    assert (run / "results.json").read_text() == (expected / "results.json").read_text()


def checkpoints(workdir: Path) -> list[Path]:
    """The model's complete checkpoints."""
    return sorted((workdir / "model").glob("[0-9]*[0-9]"))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk(tmp_path, unbroken):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        words = "checkpoint of step", "did not fit into", "Free space, and run the same line"
        ended(start(tmp_path, disk / "run"), 1, *words)
        steps = [int(path.name) for path in (disk / "run" / "model").iterdir()]
        assert steps and not any(path.suffix for path in (disk / "run" / "model").iterdir())
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        ended(start(tmp_path, disk / "run"), 0, f"going on from step {max(steps)} of 300")
        same(disk / "run", unbroken)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_workdir_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    words = r"--workdir=.*file/run cannot be written to", "name another directory"
    ended(start(tmp_path, tmp_path / "file" / "run"), 1, *words)


@pytest.mark.parametrize("harm", ["truncated", "half-written", "emptied"])
def test_an_incomplete_checkpoint(tmp_path, unbroken, harm):
    process = start(tmp_path, tmp_path / "run")
    while len(checkpoints(tmp_path / "run")) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = checkpoints(tmp_path / "run")[-1]
    if harm == "half-written":  # the machine went down in the middle of a write
        newest.rename(newest.with_suffix(".tmp"))
        words = ["model: going on from step"]
    else:
        file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[: 0 if harm == "emptied" else -7])
        words = [f"{newest.name} is damaged: .*SHA-256", "Trying the one before"]
    ended(start(tmp_path, tmp_path / "run"), 0, *words)
    same(tmp_path / "run", unbroken)


def test_a_missing_shard_of_the_data(tmp_path):
    shutil.copytree(ROOT / "tests" / "fixtures" / "movielens", tmp_path / "raw")
    data = {"data.name": "movielens", "data.dir": str(tmp_path / "raw")}
    data |= {"data.cache_dir": str(tmp_path / "cache")}
    data |= PLAIN | {"data.movielens.first": 2, "data.movielens.every": 1}
    ended(start(tmp_path, tmp_path / "run", changes=data), 0)
    shard = next((tmp_path / "cache").rglob("*.array_record*"))
    shard.unlink()
    words = f"{shard.name} is gone", "remove .* the next run prepares it again"
    ended(start(tmp_path, tmp_path / "other", changes=data), 1, *words)
    shutil.rmtree(shard.parent)
    ended(start(tmp_path, tmp_path / "other", changes=data), 0)


def test_a_batch_of_nan(tmp_path):
    """The parameters that were saved before are finite."""
    wild = LONG | {"train.learning_rate": 1e30, "train.clip": 1e30, "train.save_every": 1}
    words = "a loss is not finite", "last good checkpoint is kept", "Lower"
    ended(start(tmp_path, tmp_path / "run", changes=wild), 1, *words)
    step, leaves = saved(tmp_path / "run")
    assert step >= 1 and all(np.isfinite(leaf).all() for leaf in leaves.values())


def test_two_runs_in_one_workdir(tmp_path):
    first = start(tmp_path, tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    words = f"is held by pid {first.pid} on", "use another workdir"
    ended(start(tmp_path, tmp_path / "run"), 1, *words)
    ended(first, 0)


def test_a_checkpoint_of_another_config(tmp_path, unbroken):
    other = start(tmp_path, unbroken, "--config.machine.dim=16", "--config.train.steps=7")
    words = "config.machine.dim was 8, now 16", "config.train.steps was 300, now 7"
    ended(other, 1, *words, "use another --workdir")


@pytest.mark.parametrize("devices", ["4 pmap", "8 mesh"])
def test_more_and_fewer_devices(tmp_path, unbroken, devices):
    count, mapping = devices.split()
    process = start(tmp_path, tmp_path / "run")
    while not checkpoints(tmp_path / "run"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ended(process, 75, "run the same line again to go on")
    environment = {"JAX_NUM_CPU_DEVICES": count}
    os.environ |= environment
    try:
        flags = f"--config.train.devices={count}", f"--config.train.mapping={mapping}"
        ended(start(tmp_path, tmp_path / "run", *flags), 0, "going on from step")
    finally:
        del os.environ["JAX_NUM_CPU_DEVICES"]
    agree(tmp_path / "run", unbroken)
