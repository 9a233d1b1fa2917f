"""Drills of several processes: stopped on four, they go on as two and as one; one is killed, the job goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rmjax import train
from rmjax.workdir import lock
from tests.runs import PLAIN, tiny
from tests.test_processes import agree, start

pytestmark = pytest.mark.slow


def until(workdir: Path, step: int) -> None:
    """Waits for a line of the model's step in the log."""
    log = workdir / "metrics.jsonl"
    while not (log.exists() and f'"stage": "model", "kind": "train", "step": {step},' in log.read_text()):
        time.sleep(0.1)


LONG = PLAIN | {"train.steps": 120, "train.eval_every": 40, "train.save_every": 5}


def test_stopped_on_four_processes_it_goes_on_with_two_and_with_one(tmp_path):
    """SIGTERM, then the loss of a process, then to the end: the order of the data is one order."""
    train.train(tiny(**LONG), tmp_path / "one")
    four = start(tmp_path, tmp_path / "run", 4, LONG)
    until(tmp_path / "run", 20)
    four.send_signal(signal.SIGTERM)
    _, err = four.communicate(timeout=120)
    assert four.returncode == 75 and "run the same line again to go on" in err, err
    two = start(tmp_path, tmp_path / "run", 2, LONG)
    until(tmp_path / "run", 60)
    killed(two)
    _, err = two.communicate(timeout=60)  # the other ends by itself
    assert two.returncode == 75, err
    one = start(tmp_path, tmp_path / "run", 1, LONG)
    _, err = one.communicate(timeout=300)
    assert one.returncode == 0, err
    agree(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize("which", [0, 2])
def test_one_of_four_is_killed_and_the_job_goes_on_by_itself(tmp_path, which):
    """The others end within 60 seconds, and with RMJAX_RETRY=1 all are started again."""
    train.train(tiny(**LONG), tmp_path / "one")
    four = start(tmp_path, tmp_path / "run", 4, LONG, RMJAX_RETRY="1")
    until(tmp_path / "run", 30)
    before = killed(four, which)
    begin = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in before):
        time.sleep(0.1)
        assert time.monotonic() - begin < 60
    out, err = four.communicate(timeout=300)
    assert four.returncode == 0, err
    agree(tmp_path / "run", tmp_path / "one")


def killed(launcher: subprocess.Popen, which: int = -1) -> list[int]:
    """Kills one process of a launcher outright. -> the pids of all of them."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid), "-f", "rmjax.main"], capture_output=True, text=True)
    pids = list(map(int, found.stdout.split()))
    os.kill(pids[which], signal.SIGKILL)
    return pids


def test_a_table_split_over_the_devices_of_each_of_two_processes(tmp_path):
    """With steps that touch a batch's rows alone; evaluated, saved, and gone on with by one process."""
    mesh = {"train.mapping": "mesh", "train.model_devices": 2, "train.sparse_items": True, "train.split_layers": True}
    changes = LONG | mesh | {"train.steps": 60, "machine.kind": "rehearsal"}
    train.train(tiny(**changes | {"train.devices": 2}), tmp_path / "one")
    two = start(tmp_path, tmp_path / "run", 2, changes, JAX_NUM_CPU_DEVICES="2")
    until(tmp_path / "run", 20)
    two.send_signal(signal.SIGTERM)
    _, err = two.communicate(timeout=120)
    assert two.returncode == 75, err
    one = start(tmp_path, tmp_path / "run", 1, changes, JAX_NUM_CPU_DEVICES="4")
    _, err = one.communicate(timeout=300)
    assert one.returncode == 0, err
    agree(tmp_path / "run", tmp_path / "one")
    across = start(tmp_path, tmp_path / "other", 2, changes)  # a device each
    _, err = across.communicate(timeout=300)
    assert across.returncode == 1 and "model_devices = 2 does not divide the 1 of a process" in err, err


def test_a_mistake_of_one_is_not_tried_again(tmp_path):
    """Process 0 finds the workdir taken; all end, and no launcher types the line again."""
    with lock(tmp_path / "run"):
        begin = time.monotonic()
        two = start(tmp_path, tmp_path / "run", 2, LONG, RMJAX_RETRY="1")
        _, err = two.communicate(timeout=120)
    assert two.returncode == 78 and "is held by pid" in err and time.monotonic() - begin < 90, err
    uneven = start(tmp_path, tmp_path / "run", 2, LONG | {"train.devices": 1})
    _, err = uneven.communicate(timeout=120)
    assert uneven.returncode == 78 and "every process must have as many" in err, err
