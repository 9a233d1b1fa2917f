"""Drills: what a machine does to a run, each fault once, with what it says."""

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
    line = [
        sys.executable,
        "-m",
        "rmjax.main",
        f"--config={tmp_path / 'card.py'}",
        f"--workdir={workdir}",
        *flags,
    ]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen, code: int, *told: str) -> None:
    """With this exit code, and one line that says all of it."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert any(all(re.search(part, line) for part in told) for line in err.splitlines()), err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    ended(start(folder, folder / "run"), 0)
    return folder / "run"


def same(run: Path, whole: Path) -> None:
    assert lines(run) == lines(whole)
    assert (run / "results.json").read_text() == (whole / "results.json").read_text()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk(tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        ended(
            start(tmp_path, disk / "run"),
            1,
            "checkpoint of step",
            "did not fit into",
            "Free space, and run the same line",
        )
        steps = [int(path.name) for path in (disk / "run" / "model").iterdir()]
        assert steps and not any(path.suffix for path in (disk / "run" / "model").iterdir())
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        ended(start(tmp_path, disk / "run"), 0, f"going on from step {max(steps)} of 300")
        same(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    ended(
        start(tmp_path, tmp_path / "file" / "run"),
        1,
        r"--workdir=.*file/run cannot be written to",
        "name another directory",
    )


@pytest.mark.parametrize("harm", ["truncated", "half-written", "emptied"])
def test_a_checkpoint_that_is_not_whole(tmp_path, whole, harm):
    process = start(tmp_path, tmp_path / "run")
    while len(list((tmp_path / "run" / "model").glob("[0-9]*[0-9]"))) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    *_, before, newest = sorted((tmp_path / "run" / "model").glob("[0-9]*[0-9]"))
    if harm == "half-written":  # a machine that went down while it wrote
        newest.rename(newest.with_suffix(".tmp"))
        told = ["model: going on from step"]
    else:
        file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[: 0 if harm == "emptied" else -7])
        told = [f"{newest.name} is damaged: .*SHA-256", "Trying the one before"]
    ended(start(tmp_path, tmp_path / "run"), 0, *told)
    same(tmp_path / "run", whole)


def test_a_shard_of_the_data_is_gone(tmp_path):
    shutil.copytree(ROOT / "tests" / "fixtures" / "movielens", tmp_path / "raw")
    data = {
        "data.name": "movielens",
        "data.dir": str(tmp_path / "raw"),
        "data.cache_dir": str(tmp_path / "cache"),
    }
    data |= PLAIN | {"data.movielens.first": 2, "data.movielens.every": 1}
    ended(start(tmp_path, tmp_path / "run", changes=data), 0)
    shard = next((tmp_path / "cache").rglob("*.array_record*"))
    shard.unlink()
    ended(
        start(tmp_path, tmp_path / "other", changes=data),
        1,
        f"{shard.name} is gone",
        "remove .* prepared anew",
    )
    shutil.rmtree(shard.parent)
    ended(start(tmp_path, tmp_path / "other", changes=data), 0)


def test_a_batch_of_nan(tmp_path):
    """What was saved before is finite."""
    wild = LONG | {"train.learning_rate": 1e30, "train.clip": 1e30, "train.save_every": 1}
    ended(
        start(tmp_path, tmp_path / "run", changes=wild),
        1,
        "a loss is not finite",
        "last good checkpoint is kept",
        "Lower",
    )
    step, leaves = saved(tmp_path / "run")
    assert step >= 1 and all(np.isfinite(leaf).all() for leaf in leaves.values())


def test_two_runs_in_one_workdir(tmp_path):
    first = start(tmp_path, tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    ended(
        start(tmp_path, tmp_path / "run"),
        1,
        f"is held by pid {first.pid} on",
        "use another workdir",
    )
    ended(first, 0)


def test_a_checkpoint_of_another_config(tmp_path, whole):
    other = start(tmp_path, whole, "--config.machine.dim=16", "--config.train.steps=7")
    ended(
        other,
        1,
        "config.machine.dim was 8, now 16",
        "config.train.steps was 300, now 7",
        "use another --workdir",
    )


@pytest.mark.parametrize("devices", ["4 pmap", "8 mesh"])
def test_more_and_fewer_devices(tmp_path, whole, devices):
    count, mapping = devices.split()
    process = start(tmp_path, tmp_path / "run")
    while not (tmp_path / "run" / "model").is_dir() or not list(
        (tmp_path / "run" / "model").glob("[0-9]*[0-9]")
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ended(process, 75, "run the same line again to go on")
    environment = {"JAX_NUM_CPU_DEVICES": count}
    os.environ |= environment
    try:
        more = start(
            tmp_path,
            tmp_path / "run",
            f"--config.train.devices={count}",
            f"--config.train.mapping={mapping}",
        )
        ended(more, 0, "going on from step")
    finally:
        del os.environ["JAX_NUM_CPU_DEVICES"]
    agree(tmp_path / "run", whole)
