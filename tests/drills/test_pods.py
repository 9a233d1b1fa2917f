"""Drills of several processes: they stop, lose a process, and continue as fewer or as many."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest

from rmjax.run import training
from rmjax.run.workdir import EXIT_MISTAKE, lock
from tests.run.test_devices import fifty_steps
from tests.run.test_processes import ROOT, agree, start
from tests.runs import PLAIN, tiny

pytestmark = pytest.mark.slow


def until(workdir: Path, step: int) -> None:
    """Waits until the log has a line of a step of the model."""
    log, line = workdir / "metrics.jsonl", f'"stage": "model", "kind": "train", "step": {step},'
    while not (log.exists() and line in log.read_text()):
        time.sleep(0.1)


LONG = PLAIN | {"train.steps": 120, "train.eval_every": 40, "train.save_every": 5}


def test_a_run_stopped_on_four_processes_continues_with_two_and_with_one(tmp_path):
    """SIGTERM ends four, the loss of a process ends two, one runs to the end: one order of data."""
    training.train(tiny(**LONG), tmp_path / "one")
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
def test_the_job_continues_by_itself_after_one_of_four_is_killed(tmp_path, which):
    """The others end within 60 seconds. With RMJAX_RETRY=1 all start again."""
    training.train(tiny(**LONG), tmp_path / "one")
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
    """Kills one process of a launcher; returns the pids of all of them."""
    line = ["pgrep", "-P", str(launcher.pid), "-f", "rmjax.main"]
    pids = list(map(int, subprocess.check_output(line, text=True).split()))
    os.kill(pids[which], signal.SIGKILL)
    return pids


def test_a_table_split_over_the_devices_of_each_of_two_processes(tmp_path):
    """Two processes train with sparse steps, evaluate and save; one process continues."""
    mesh = {"train.mapping": "mesh", "train.model_devices": 2}
    mesh |= {"train.sparse_items": True, "train.split_layers": True}
    changes = LONG | mesh | {"train.steps": 60, "machine.kind": "rehearsal"}
    training.train(tiny(**changes | {"train.devices": 2}), tmp_path / "one")
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
    assert across.returncode == EXIT_MISTAKE, err
    assert "model_devices = 2 does not divide the 1 of a process" in err


def together(processes: int, line: list, devices: int = 1) -> list[int]:
    """Runs `python -c *line` in several processes that may join; returns their exit codes."""
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices)}
    line = [sys.executable, "-c", *map(str, line)]
    started = [
        subprocess.Popen(line, env=environment | {"JAX_PROCESS_ID": str(i)})
        for i in range(processes)
    ]
    return [process.wait(timeout=300) for process in started]


STEPS = """
import pickle, sys
import jax
from rmjax.run import processes
processes.join(None, None, None)
from tests.run.test_devices import fifty_steps  # after joining, since it counts devices
layout = *sys.argv[2:3], *map(int, sys.argv[3:5])
result = fifty_steps(*layout, sparse_items=sys.argv[5] == "sparse")
pickle.dump(result, open(f"{sys.argv[1]}/{jax.process_index()}", "wb"))
"""


@pytest.mark.parametrize(
    ("processes", "devices", "layout"),
    [
        (2, 1, "pmap 2 1 dense"),
        (4, 1, "pmap 4 1 sparse"),
        (2, 4, "mesh 8 4 sparse"),
        (4, 2, "mesh 8 2 dense"),
    ],
)
def test_fifty_steps_agree_in_double_precision(tmp_path, processes, devices, layout):
    """The steps are those of one process. Every process has `devices` devices."""
    assert together(processes, [STEPS, tmp_path, *layout.split()], devices) == [0] * processes
    expected = fifty_steps("pmap", 1, sparse_items=layout.endswith("sparse"))
    for index in range(processes):
        got = pickle.loads((tmp_path / str(index)).read_bytes())
        chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-8)


SAVES = """
import time, sys
import numpy as np
from rmjax.run import processes
processes.join(None, None, None)
from rmjax.io.checkpoint import Checkpoints
checkpoints, commit = Checkpoints(sys.argv[1], keep_last=2), Checkpoints._commit
Checkpoints._commit = lambda *given: (time.sleep(2), commit(*given))
for step, score in ((1, 0.1), (2, 0.9)):
    checkpoints.save(step, {"w": np.full(3, step)}, score)
step, tree = checkpoints.restore({"w": np.zeros(3, int)}, best=True)
assert step == 2 and (tree["w"] == 2).all()
"""


def test_the_best_checkpoint_is_restored_while_process_0_still_writes_it(tmp_path):
    assert together(2, [SAVES, tmp_path]) == [0, 0]


def test_an_unexpected_error_ends_all_processes(tmp_path):
    """It happens in process 1, which logs its traceback. No process waits for another."""
    begin = time.monotonic()
    two = start(tmp_path, tmp_path / "run", 2, LONG, LOSES_A_KEY="1", RMJAX_RETRY="1")
    _, err = two.communicate(timeout=200)
    assert two.returncode == EXIT_MISTAKE and "KeyError: 'key'" in err, err
    assert time.monotonic() - begin < 90


def test_a_mistake_of_one_process_is_not_tried_again(tmp_path):
    """Another run holds the workdir of process 0. All end, and the launcher does not retry."""
    with lock(tmp_path / "run"):
        begin = time.monotonic()
        two = start(tmp_path, tmp_path / "run", 2, LONG, RMJAX_RETRY="1")
        _, err = two.communicate(timeout=120)
    assert two.returncode == EXIT_MISTAKE and "is held by pid" in err, err
    assert time.monotonic() - begin < 90
    uneven = start(tmp_path, tmp_path / "run", 2, LONG | {"train.devices": 1})
    _, err = uneven.communicate(timeout=120)
    assert uneven.returncode == EXIT_MISTAKE and "every process must have as many" in err, err
